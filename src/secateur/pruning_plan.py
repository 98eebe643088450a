"""What a pruning does where that was not asked for, and what does not go together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from secateur.choosing.allocation import FEWEST as FEWEST_MEASURED
from secateur.errors import InvalidInputError, invalid
from secateur.relations import RELATED
from secateur.restoring.distillation import FEWEST, HELD_OUT
from secateur.restoring.quality import MOST_TEXTS
from secateur.restoring.reconstruction import FEWEST as FEWEST_FITTED
from secateur.scorers.score import Labels
from secateur.settings import Budget, Cut, Reading, Restore
from secateur.support.checks import check_whole
from secateur.support.defaults import UNITS
from secateur.support.processes import is_shared
from secateur.texts.examples import Example, source_of

SCORED_TEXTS = 1024
"""Texts that are scored and fitted on at most, where all are read to distil."""


def recommended(cut: Cut, restore: Any, texts: Any) -> tuple[Cut, Restore, tuple[str, ...]]:
    """Fill in what was not asked for, and leave out what there are too few texts for; say which in the last value.

    Heads and neurons that stay are refitted, and where a budget takes more than heads, need says where units go and the
    smaller model is taught.
    """
    if restore not in (None, *get_args(Restore)):
        raise invalid("restore", "be 'none', 'reconstruct' or 'distill'", restore)
    allocation = cut.allocation
    of_all = any(budget.quantity not in UNITS for budget in cut.budgets)
    deep = of_all and cut.kinds != ("heads",) and texts is not None
    measures = "`plain`" if cut.plain else "a budget of similarity" if cut.similarity else ""
    if measures and allocation not in (None, "sensitivity"):
        raise invalid("allocation", f"be 'sensitivity' with {measures}", allocation)
    is_unasked = deep and allocation is None and not measures
    left_out = [_lacking("allocated by sensitivity", texts, FEWEST_MEASURED) if is_unasked else ""]
    if allocation is None:
        needs = measures or (deep and left_out == [""])
        cut = replace(cut, allocation="sensitivity" if needs else "uniform")
    if cut.allocation == "sensitivity" and not cut.budgets:
        limit = 1 - cut.pruning_ratio
        cut = replace(cut, budget=[Budget(kind, limit) for kind in cut.kinds])  # type: ignore[arg-type]
    usual: Restore = "none" if texts is None or cut.kinds == ("layers",) else "reconstruct"
    found: Restore = restore or ("distill" if deep and allocation is None else usual)
    steps: list[tuple[Restore, str, int, Restore]] = [
        ("distill", "distilled", FEWEST, usual),
        ("reconstruct", "reconstructed", FEWEST_FITTED, "none"),
    ]
    for step, what, fewest, instead in steps:
        # A stream is refused where that was asked for: see `check_steps`.
        if found == step and not (restore and not isinstance(texts, Sequence)):
            left_out.append(line := _lacking(what, texts, fewest))
            found = instead if line else found
    return cut, found, tuple(filter(None, left_out))


def _lacking(what: str, texts: Any, fewest: int) -> str:
    """Return the line that says why something is not done on these texts, empty where they suffice."""
    if not isinstance(texts, Sequence):
        return f"not {what}: texts in a list are needed, which can be read again"
    return too_few(what, texts, fewest)


def too_few(what: str, texts: Sequence[Any], fewest: int) -> str:
    """Return the line that says for what there are fewer than `fewest` texts, empty where there are enough."""
    noun = source_of(texts) if len(texts) != 1 else source_of(texts)[:-1]
    return f"not {what}: {len(texts)} {noun}, {fewest} are needed" if len(texts) < fewest else ""


def check_steps(texts: Any, cut: Cut, restore: Restore, steps: int, reading: Reading) -> None:
    """Raise `InvalidInputError` for steps that do not go together, before a model is loaded."""
    check_whole("steps", steps)
    needed = {
        "`refine` needs `texts` to judge masks by": cut.refine > 0,
        "`restore` needs `texts` to fit on": restore != "none",
        "`allocation` 'sensitivity' needs `texts` to measure sites on": cut.allocation == "sensitivity",
    }
    if any(needed.values()) and not isinstance(texts, Sequence):
        needs = next(text for text, is_needed in needed.items() if is_needed)
        raise InvalidInputError(f"{needs}, in a list, as it reads them again")
    if cut.similarity is not None and len(texts) < HELD_OUT * RELATED:
        rule = f"be at least {HELD_OUT * RELATED} with a budget of similarity, as one of {HELD_OUT} judges"
        raise invalid(source_of(texts), rule, len(texts))
    if cut.refine and cut.kinds != ("heads",):
        raise invalid("refine", f"be 0 where {', '.join(cut.kinds)} go, as it exchanges heads alone", cut.refine)
    for wanted in cut.budgets:
        if cut.refine and cut.allocation == "ranking" and wanted.quantity != "heads":
            rule = f"be 0 with allocation 'ranking' and the budget {wanted}, which exchanges may exceed"
            raise invalid("refine", rule, cut.refine)
        if wanted.quantity == "latency" and cut.latency_table is None and is_shared(reading.accelerator):
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
