"""What a pruning does where that was not asked for, and what does not go together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from secateur.errors import InvalidInputError, invalid
from secateur.relations import RELATED
from secateur.restoring.distillation import FEWEST, HELD_OUT
from secateur.restoring.quality import MOST_TEXTS
from secateur.scorers.score import Labels
from secateur.settings import Budget, Cut, Reading, Restore
from secateur.support.checks import check_whole
from secateur.support.defaults import UNITS
from secateur.support.processes import is_shared
from secateur.texts.examples import Example, source_of

SCORED_TEXTS = 1024
"""Texts that are scored and fitted on at most, where all are read to distil."""


def recommended(cut: Cut, allocation: str | None, restore: Any, texts: Any) -> tuple[Cut, Restore]:
    """Fill in what was not asked for: need and distillation where a budget takes more than heads."""
    if restore not in (None, *get_args(Restore)):
        raise invalid("restore", "be 'none', 'reconstruct' or 'distill'", restore)
    of_all = any(budget.quantity not in UNITS for budget in cut.budgets)
    deep = of_all and cut.kinds != ("heads",) and isinstance(texts, Sequence) and len(texts) >= FEWEST
    measures = "`plain`" if cut.plain else "a budget of similarity" if cut.similarity else ""
    if measures and allocation not in (None, "sensitivity"):
        raise invalid("allocation", f"be 'sensitivity' with {measures}", allocation)
    if allocation is None and (deep or measures):
        cut = replace(cut, allocation="sensitivity")
    if cut.allocation == "sensitivity" and not cut.budgets:
        limit = 1 - cut.pruning_ratio
        cut = replace(cut, budget=[Budget(kind, limit) for kind in cut.kinds])  # type: ignore[arg-type]
    return cut, restore or ("distill" if deep and allocation is None else "none")


def check_steps(texts: Any, cut: Cut, refine: int, restore: Restore, steps: int, reading: Reading) -> None:
    """Raise `InvalidInputError` for steps that do not go together, before a model is loaded."""
    check_whole("refine", refine, 0)
    check_whole("steps", steps)
    needed = {
        "`refine` needs `texts` to judge masks by": bool(refine),
        "`restore` needs `texts` to fit on": restore != "none",
        "`allocation` 'sensitivity' needs `texts` to measure sites on": cut.allocation == "sensitivity",
    }
    if any(needed.values()) and not isinstance(texts, Sequence):
        needs = next(text for text, is_needed in needed.items() if is_needed)
        raise InvalidInputError(f"{needs}, in a list, as it reads them again")
    if cut.similarity is not None and len(texts) < HELD_OUT * RELATED:
        rule = f"be at least {HELD_OUT * RELATED} with a budget of similarity, as one of {HELD_OUT} judges"
        raise invalid(source_of(texts), rule, len(texts))
    if refine and cut.kinds != ("heads",):
        raise invalid("refine", f"be 0 where {', '.join(cut.kinds)} go, as it exchanges heads alone", refine)
    for wanted in cut.budgets:
        if refine and cut.allocation == "ranking" and wanted.quantity != "heads":
            rule = f"be 0 with allocation 'ranking' and the budget {wanted}, which exchanges may exceed"
            raise invalid("refine", rule, refine)
        if wanted.quantity == "latency" and is_shared(reading.accelerator):
            raise invalid(
                "budget", "be of another kind under a launcher, whose processes would time each other", wanted
            )


def without_held_out(
    texts: Any, labels: Labels | None, restore: Restore, reading: Reading
) -> tuple[Any, Labels | None, Sequence[Example], Reading]:
    """Return texts and labels to work with, the texts to judge a model by that is taught, and how texts are read.

    Held out is one text of ten, at most 256, drawn with the seed. All others teach, some of which are scored.
    """
    count = min(len(texts) // HELD_OUT, MOST_TEXTS) if restore == "distill" else 0
    held_out: Sequence[Example] = []
    if count >= RELATED:
        if labels is not None and len(labels) != len(texts):
            raise invalid("labels", f"have one entry for each text, {len(texts)}", len(labels))
        chosen = set(random.Random(reading.seed).sample(range(len(texts)), count))
        left = [number for number in range(len(texts)) if number not in chosen]
        labels = cast(Any, None if labels is None else [labels[number] for number in left])
        texts, held_out = [texts[number] for number in left], [texts[number] for number in sorted(chosen)]
    if restore == "distill" and reading.stop == "all":
        reading = replace(reading, stop=min(SCORED_TEXTS, len(texts)))
    return texts, labels, held_out, reading
