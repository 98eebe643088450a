"""The smallest share of a model's work with which it stays as near to the dense one as was asked for."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from secateur.choosing.allocation import SensitivitySelection
from secateur.errors import InvalidInputError, invalid
from secateur.restoring.quality import QualityJudge
from secateur.restoring.reconstruction import reconstruct_
from secateur.settings import Budget
from secateur.support.interrupts import undoing
from secateur.units.masks import Mask
from secateur.units.scores import Scores


def smallest_keeping(
    selection: SensitivitySelection, scores: Scores, judge: QualityJudge, similarity: Budget, reconstructs: bool
) -> tuple[Budget, Mask, float]:
    """Return the smallest budget, in hundredths of `selection`'s quantity, whose mask keeps a mean cosine.

    Also the mask and the cosine, which `judge` measures under gates; of a model that is reconstructed first where it
    will be. Sites are measured once, and the share is bisected, as less work keeps less: seven tries at most. The model
    is left as it was. Raises `InvalidInputError` where no share below the whole keeps the cosine.
    """
    assert selection.joint is not None
    quantity, shape = selection.joint.quantity, selection.joint.shape
    measured = selection.measure(scores)
    found: dict[int, tuple[Budget, Mask, float]] = {}

    def keeps(hundredths: int) -> bool:
        budget = Budget(quantity, hundredths / 100, shape)
        try:
            mask, _ = selection.at(budget).choose(scores, measured)
        except InvalidInputError:  # the budget is out of reach
            return False
        found[hundredths] = budget, mask, _cosine(selection, mask, judge, reconstructs)
        return found[hundredths][2] >= similarity.limit

    tried = range(1, 100)
    place = bisect.bisect_left(tried, True, key=keeps)
    if place < len(tried):
        return found[tried[place]]
    nearest = max((cosine for _, _, cosine in found.values()), default=0.0)
    rule = f"be at most similarity={math.floor(1000 * nearest) / 1000:g}, which this model keeps with {quantity}=0.99"
    raise invalid("budget", rule, str(similarity), "nothing can go without changing more")


def _cosine(selection: SensitivitySelection, mask: Mask, judge: QualityJudge, reconstructs: bool) -> float:
    prepared = selection.prepared
    with _weights_put_back(prepared.base):
        if reconstructs:
            reconstruct_(prepared, mask, cast(Any, selection.texts), reading=selection.reading)
        kept = mask.present(selection.sites)
        return judge({name: row.float() for name, row in kept.items()}).cosine


@undoing
def _weights_put_back(model: nn.Module) -> Iterator[None]:
    """Give parameters the tensors back that they held; what a refit puts in their place is another one."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
