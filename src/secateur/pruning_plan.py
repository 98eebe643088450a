"""What a pruning does where that was not asked for, and what does not go together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from secateur.errors import InvalidInputError, invalid
from secateur.relations import RELATED
from secateur.restoring.distillation import FEWEST
from secateur.restoring.quality import MOST_TEXTS
from secateur.scorers.score import Labels
from secateur.settings import Budget, Cut, Reading, Restore
from secateur.support.defaults import UNITS
from secateur.support.processes import is_shared
from secateur.texts.tokenization import Text


def recommended(cut: Cut, allocation: str | None, restore: Any, texts: Any) -> tuple[Cut, Restore]:
    """Fill in what was not asked for: need and distillation where a budget takes more than heads."""
    of_all = any(budget.quantity not in UNITS for budget in cut.budgets)
    deep = of_all and cut.kinds != ("heads",) and isinstance(texts, Sequence) and len(texts) >= FEWEST
    if allocation is None and deep:
        cut = replace(cut, allocation="sensitivity")
    elif allocation == "sensitivity" and not cut.budgets:
        limit = 1 - cut.pruning_ratio
        cut = replace(cut, budget=[Budget(kind, limit) for kind in cut.kinds])  # type: ignore[arg-type]
    return cut, restore or ("distill" if deep and allocation is None else "none")


def check_steps(texts: Any, cut: Cut, refine: int, restore: str, reading: Reading) -> None:
    """Raise `InvalidInputError` for steps that do not go together, before a model is loaded."""
    needed = {
        "`refine` needs `texts` to judge masks by": bool(refine),
        "`restore` needs `texts` to fit on": restore != "none",
        "`allocation` 'sensitivity' needs `texts` to measure sites on": cut.allocation == "sensitivity",
    }
    if any(needed.values()) and not isinstance(texts, Sequence):
        needs = next(text for text, is_needed in needed.items() if is_needed)
        raise InvalidInputError(f"{needs}, in a list, as it reads them again")
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
    texts: Sequence[Text], labels: Labels | None, seed: int
) -> tuple[Sequence[Text], Labels | None, Sequence[Text]]:
    """Return the texts and their labels without one text of ten, at most 256, drawn with the seed, and these."""
    count = min(len(texts) // 10, MOST_TEXTS)
    if count < RELATED:
        return texts, labels, []
    if labels is not None and len(labels) != len(texts):
        raise invalid("labels", f"have one entry for each text, {len(texts)}", len(labels))
    chosen = set(random.Random(seed).sample(range(len(texts)), count))
    left = [number for number in range(len(texts)) if number not in chosen]
    own_labels: Any = None if labels is None else [labels[number] for number in left]
    return [texts[number] for number in left], own_labels, [texts[number] for number in sorted(chosen)]
