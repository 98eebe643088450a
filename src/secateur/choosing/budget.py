"""Budgets in the user's terms: how much of a model's heads, parameters, work or time may stay, and the mask for it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.errors import invalid
from secateur.measuring.cost import ModelCost, check_heads, compare_latency, measure_cost
from secateur.measuring.latency_table import LatencyTable, measure_latency, shared_copy
from secateur.measuring.timing import median_ratio
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.base_model import base_of
from secateur.settings import Budget, Quantity
from secateur.sites.attention import find_sites
from secateur.sites.layout import AttentionSite, Site
from secateur.units.masks import Mask
from secateur.units.scores import PresentScores, Scores
from secateur.units.select import Allocation, check_scores, check_selection, groups_of, select

_ROUNDING = 1e-9


@dataclass(frozen=True)
class BudgetOutcome:
    """A budget, the share that its mask was expected to leave, and the share measured in the pruned model.

    The two are equal but for latency, whose table is kept.
    """

    budget: Budget
    expected: float
    reached: float
    table: LatencyTable | None = None

    def __str__(self) -> str:
        """Say in a few words what was reached."""
        return f"{self.budget.quantity} {self.reached:.3f} of what they were (budget {self.budget})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        table = {} if self.table is None else {"latency_table": self.table.to_json()}
        return {"asked": str(self.budget), "expected": self.expected, "reached": self.reached, **table}


def within_budget(
    scores: Scores,
    limit: float,
    share: Callable[[Mask], float],
    allocation: Allocation = "uniform",
    floor: int = 1,
    rounded: Callable[[Mask], Mask] | None = None,
) -> tuple[Mask, float] | None:
    """Return the mask of the smallest pruning ratio that leaves at most `limit`, and that ratio; None where none does.

    `share` says how much a mask leaves, `rounded` what becomes of a mask before it is judged. A ratio's mask is that of
    `select`. Every ratio is tried, from the smallest. They are bisected where a larger ratio drops all that a
    smaller one does: with allocation "ranking", where all groups of units are of one size and masks are judged as they
    are.
    """
    ratios = _ratios(scores, allocation)
    sizes = {len(group) for site in scores for group in groups_of(scores, site)}

    def mask_at(ratio: float) -> Mask:
        mask = select(scores, ratio, allocation, floor)
        return mask if rounded is None else rounded(mask)

    def fits(ratio: float) -> bool:
        return share(mask_at(ratio)) <= limit + _ROUNDING

    if allocation == "ranking" and len(sizes) == 1 and rounded is None:
        place = bisect.bisect_left(ratios, True, key=fits)
        found = ratios[place] if place < len(ratios) else None
    else:
        found = next((ratio for ratio in ratios if fits(ratio)), None)
    return None if found is None else (mask_at(found), found)


class BudgetedSelection:
    """Finds for a model the smallest pruning ratio whose mask keeps within a budget, see `within_budget`.

    `heads`, `params` and `macs` are counted, exactly. Latency is read from a table that is measured here, once, on this
    machine; a site keeps more units than its share where the table shows that to be faster. `expected_ratio` is the
    ratio for equal scores, which is what any scores get where all sites are alike.

    Raises `InvalidInputError` where even the largest ratio exceeds the budget, and says what that ratio reaches, and
    `UnsupportedModelError` for a model that has no heads left.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        allocation: Allocation = "uniform",
        floor: int = 1,
        progress: bool = False,
        sites: Mapping[str, AttentionSite] | None = None,
    ) -> None:
        self.budget, self.allocation, self.floor = budget, allocation, floor
        base = base_of(model)
        self.costs = UnitCosts(model, find_sites(base) if sites is None else sites, *budget.shape)
        check_heads(model, self.costs.dense.heads)
        self.table: LatencyTable | None = None
        self._dense: Any = None
        if budget.quantity == "latency":
            self.table = measure_latency(base, self.costs, budget.shape, progress=progress)
            self._dense = shared_copy(base, self.costs.sites)
        equal = _equal_scores(self.costs.sites)
        found = within_budget(equal, budget.limit, self.share, allocation, floor)
        if found is None:
            largest = _ratios(equal, allocation)[-1]
            least = self.share(select(equal, largest, allocation, floor))
            raise invalid(
                "budget",
                f"be at least {budget.quantity}={math.ceil(1000 * least) / 1000:g}, the share that this model keeps at "
                f"the largest pruning ratio, {largest:.3f}, every site with {floor} or more of its heads",
                str(budget),
            )
        self.expected_ratio = found[1]

    def select(self, scores: Scores) -> tuple[Mask, float]:
        """Return the mask that these scores give within the budget, and the pruning ratio that it comes from."""
        rounded = partial(self._rounded, scores) if self.table is not None else None
        found = within_budget(scores, self.budget.limit, self.share, self.allocation, self.floor, rounded)
        if found is None:
            raise invalid("budget", "be one that these scores can be selected for", str(self.budget))
        return found

    def share(self, mask: Mask) -> float:
        """Return how much of the budget's quantity is left with `mask`, as counted or as the table says."""
        if self.table is None:
            return _left(self.budget.quantity, self.costs.dense, self.costs.after(mask))
        kept = mask.present(self.costs.sites)
        saved = {name: self.costs.saved_macs(name, kept[name]) for kind in self.table.kinds for name in kind.sites}
        return 1 - sum(kind.saved(saved[name]) for kind in self.table.kinds for name in kind.sites)

    def outcome(self, mask: Mask, pruned: nn.Module) -> BudgetOutcome:
        """Measure how much is left in the model pruned with `mask`: latency in turn with the model as it was."""
        expected = self.share(mask)
        if self._dense is None:
            left = _left(self.budget.quantity, self.costs.dense, measure_cost(pruned, *self.budget.shape))
            return BudgetOutcome(self.budget, expected, left)
        seconds = compare_latency({"dense": self._dense, "pruned": base_of(pruned)}, *self.budget.shape)
        left = median_ratio(seconds["pruned"], seconds["dense"])
        return BudgetOutcome(self.budget, expected, left, self.table)

    def _rounded(self, scores: Scores, mask: Mask) -> Mask:
        """Give sites the best of their dropped units back where more were measured to be faster."""
        assert self.table is not None
        rows = dict(mask)
        for kind in self.table.kinds:
            for name in kind.sites:
                if name in mask and self.costs.sites[name].group_size == 1:  # a site without scores stays whole
                    more = kind.rounded(int(mask[name].sum())) - int(mask[name].sum())
                    dropped = torch.where(mask[name], -math.inf, scores[name])
                    rows[name] = mask[name].clone()
                    rows[name][dropped.argsort(descending=True, stable=True)[:more]] = True
        return Mask(rows)


def allocate(
    model: nn.Module,
    scores: Scores,
    *,
    budget: str | Budget,
    allocation: Allocation = "uniform",
    floor: int = 1,
) -> Mask:
    """Return the mask of the smallest pruning ratio that keeps `model` within a budget, as `Budget.parse` reads it.

    The other arguments are those of `select`. Raises `InvalidInputError` for a budget that cannot be reached.
    """
    check_selection(0, allocation, floor)
    check_scores(scores)
    return BudgetedSelection(model, Budget.of(budget), allocation, floor).select(scores)[0]


def _ratios(scores: Scores, allocation: Allocation) -> list[float]:
    """Return the pruning ratios at which another mask begins."""
    present = [int((vector > -math.inf).sum()) for vector in scores.values()]
    sizes = {sum(present)} if allocation == "ranking" else set(present)
    return sorted({dropped / size for size in sizes for dropped in range(size)})


def _equal_scores(sites: Mapping[str, Site]) -> Scores:
    return PresentScores.of({name: torch.zeros(site.num_units) for name, site in sites.items()}, sites).original(sites)


def _left(quantity: Quantity, dense: ModelCost, after: ModelCost) -> float:
    if quantity == "heads":
        return after.heads / dense.heads
    if quantity == "params":
        return after.parameters / dense.parameters
    return after.macs / dense.macs
