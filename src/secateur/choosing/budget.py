"""Budgets in the user's terms: how much of a model's heads, parameters, work or time may stay, and the mask for it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InvalidInputError, UnsupportedModelError, invalid
from secateur.measuring.cost import ModelCost, check_heads, compare_latency, measure_cost
from secateur.measuring.latency_table import LatencyTable, measure_latency, shared_copy
from secateur.measuring.timing import median_ratio
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.base_model import base_of
from secateur.settings import AnyBudget, Budget, Cut, budgets_of
from secateur.sites.finding import find_units
from secateur.sites.layout import Site
from secateur.support.defaults import MULTIPLE, UNITS
from secateur.support.interrupts import interruptible
from secateur.units.masks import Mask, is_within, layers_gone
from secateur.units.scores import PresentScores, Scores
from secateur.units.select import Allocation, check_scores, check_selection, has_groups, select

_ROUNDING = 1e-9


@dataclass(frozen=True)
class BudgetOutcome:
    """A budget, the share that its mask was expected to leave, and the share measured in the pruned model.

    The two are equal but for latency that is measured here, whose table is kept. `is_measured` is False where a given
    table alone says it.
    """

    budget: Budget
    expected: float
    reached: float
    table: LatencyTable | None = None
    is_measured: bool = True

    def __str__(self) -> str:
        """Say in a few words what was reached."""
        if self.budget.quantity == "similarity":
            return f"mean cosine {self.reached:.4f} (budget {self.budget})"
        by = "" if self.is_measured else ", as the table says"
        return f"{self.budget.quantity} {self.reached:.3f} of what they were{by} (budget {self.budget})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        table = {} if self.table is None else {"latency_table": self.table.to_json()}
        found = {"asked": str(self.budget), "expected": self.expected, "reached": self.reached}
        return {**found, **table, **({} if self.is_measured else {"is_measured": False})}


def within_budget(
    scores: Scores,
    limit: float,
    share: Callable[[Mask], float],
    allocation: Allocation = "uniform",
    floor: int = 1,
    rounded: Callable[[Mask], Mask] | None = None,
    multiple: int = MULTIPLE,
) -> tuple[Mask, float] | None:
    """Return the mask of the smallest pruning ratio that leaves at most `limit`, and that ratio; None where none does.

    `share` says how much a mask leaves, `rounded` what becomes of a mask before it is judged. A ratio's mask is that of
    `select`. Every ratio at which another mask may begin is tried, from the smallest. They are bisected where a larger
    ratio leaves no more of anything than a smaller one: with allocation "ranking", or where no units share weights, and
    masks are judged as they are.
    """
    ratios = _ratios(scores, allocation, multiple)
    nested = allocation == "ranking" or not any(has_groups(scores, site) for site in scores)

    def mask_at(ratio: float) -> Mask:
        mask = select(scores, ratio, allocation, floor, multiple)
        return mask if rounded is None else rounded(mask)

    def fits(ratio: float) -> bool:
        return share(mask_at(ratio)) <= limit + _ROUNDING

    if nested and rounded is None:
        place = bisect.bisect_left(ratios, True, key=fits)
        found = ratios[place] if place < len(ratios) else None
    else:
        found = next((ratio for ratio in ratios if fits(ratio)), None)
    return None if found is None else (mask_at(found), found)


class BudgetedSelection:
    """Finds for a model the smallest pruning ratio whose mask keeps within a budget, see `within_budget`.

    Units, `params` and `macs` are counted, exactly. Latency is read from a table that is measured here, once, on this
    machine; a site keeps more units than its share where the table shows that to be faster. A budget for one kind of
    units has a ratio of its own; one that counts all finds the ratio of the kinds that have none. `expected_ratio` is
    that of the heads for equal scores, which is what any scores get where all sites are alike.

    Raises `InvalidInputError` where even the largest ratio exceeds the budget, and says what that ratio reaches, and
    `UnsupportedModelError` for a model that has no heads left.
    """

    def __init__(
        self, model: nn.Module, cut: Cut, progress: bool = False, sites: Mapping[str, Site] | None = None
    ) -> None:
        base = base_of(model)
        self.cut, self.model = cut, model
        self.sites = find_units(base, cut.kinds) if sites is None else sites
        self.own = {one.quantity: one for one in cut.budgets if one.quantity in UNITS}
        self.joint = next((one for one in cut.budgets if one.quantity not in UNITS), None)
        if cut.similarity is not None:
            raise invalid("budget", "be about what is left; `prune` alone keeps a similarity", str(cut.similarity))
        shape = (self.joint or cut.budgets[0]).shape
        self.costs = UnitCosts(model, self.sites, *shape)
        if "heads" in cut.kinds:
            check_heads(model, self.costs.dense.heads)
        self.table: LatencyTable | None = None
        self._dense: Any = None
        if self.joint is not None and self.joint.quantity == "latency":
            if cut.latency_table is None:
                self.table = measure_latency(base, self.costs, shape, progress=progress)
                self._dense = shared_copy(base, self.sites)
            else:
                self.table = LatencyTable.load(cut.latency_table)
                self.table.check_fits(self.sites, shape)
        self.expected_ratio = self._select(_equal_scores(self.sites), replace(cut, exclude=()))[1]

    def select(self, scores: Scores) -> tuple[Mask, float]:
        """Return the mask that these scores give within the budget, and the pruning ratio of its heads.

        Where heads have no part in it, the ratio is that of the first kind of units.
        """
        return self._select(scores, self.cut)

    def _select(self, scores: Scores, cut: Cut) -> tuple[Mask, float]:
        scores = cut.may_go(scores)
        rows: dict[str, Tensor] = {}
        ratios: dict[str, float] = {}
        for kind, budget in self.own.items():
            mask, ratios[kind] = self._within(_of_kinds(scores, {kind}), budget, partial(self._units_left, kind), {})
            rows |= mask
        others = {kind for kind in self.cut.kinds if kind not in self.own}
        if self.joint is not None and (left := _of_kinds(scores, others)) is not None:
            mask, ratio = self._within(left, self.joint, lambda mask: self.share(Mask({**rows, **mask})), rows)
            rows |= mask
            ratios |= dict.fromkeys(others, ratio)
        ratio = ratios.get("heads", next(iter(ratios.values())))
        return Mask({name: rows[name] for name in scores if name in rows}), ratio

    def _within(
        self, scores: Scores | None, budget: Budget, share: Callable[[Mask], float], rows: Mapping[str, Tensor]
    ) -> tuple[Mask, float]:
        """Return the mask of some kinds that keeps within one budget, `rows` being chosen already, and its ratio."""
        cut = self.cut
        if scores is None:
            raise invalid("budget", "be about units that are scored", str(budget))
        rounded = partial(self._rounded, scores) if self.table is not None and budget is self.joint else None
        found = within_budget(scores, budget.limit, share, cut.ranked, cut.floor, rounded, cut.multiple)
        if found is None:
            raise self.out_of_reach(scores, budget, share)
        return found

    def out_of_reach(self, scores: Scores, budget: Budget, share: Callable[[Mask], float]) -> InvalidInputError:
        """Say what the largest pruning ratio reaches, and what does more where other kinds of units could go too."""
        cut = self.cut
        largest = _ratios(scores, cut.ranked, cut.multiple)[-1]
        least = share(select(scores, largest, cut.ranked, cut.floor, cut.multiple))
        kinds = " and ".join(dict.fromkeys(scores.kinds.values()))
        rule = (
            f"be at least {budget.quantity}={math.ceil(1000 * least) / 1000:g}, the share that this model keeps at the "
            f"largest pruning ratio, {largest:.3f}, of its {kinds}, every site with {cut.floor} or more"
        )
        return invalid("budget", rule, str(budget), self._what_reaches(budget))

    def _what_reaches(self, budget: Budget) -> str:
        """Say how little all kinds of units can leave, where not all may go yet."""
        more = [kind for kind in UNITS if kind not in self.cut.kinds]
        if budget.quantity not in ("macs", "params") or not more:
            return "a smaller floor leaves less"
        try:
            sites = find_units(self.model, UNITS)
        except UnsupportedModelError:
            return "a smaller floor leaves less"
        scores = _equal_scores(sites)
        ratio = _ratios(scores, "uniform", self.cut.multiple)[-1]
        costs = UnitCosts(self.model, sites, *budget.shape)
        least = _left(budget, costs, select(scores, ratio, "uniform", self.cut.floor, self.cut.multiple))
        return f"with {', '.join(UNITS)} together {least:.2f} can be reached (`units`)"

    def _units_left(self, kind: str, mask: Mask) -> float:
        """Return the share of the units of a kind that are there now and stay."""
        kept = [row for name, row in mask.present(self.sites).items() if self.sites[name].kind == kind]
        return sum(int(row.sum()) for row in kept) / max(sum(map(len, kept)), 1)

    def share(self, mask: Mask) -> float:
        """Return how much of what counts all units is left with `mask`, as counted or as the table says."""
        assert self.joint is not None
        if self.table is None:
            return _left(self.joint, self.costs, mask)
        kept = mask.present(self.sites)
        gone = layers_gone(self.sites, kept)
        others = [name for name, site in self.sites.items() if site.kind != "layers" and not is_within(name, gone)]
        saved = [self.share_of_layer(self.joint, path) for path in gone]
        return 1 - sum([*saved, *(self.share_of_site(self.joint, name, kept[name]) for name in others)])

    def share_of_site(self, budget: Budget, name: str, kept: Tensor) -> float:
        """Return the share of a budget's quantity that one site saves with the units in `kept` (bool `[units now]`)."""
        if budget.quantity in self.own:
            there = sum(site.num_units for site in self.sites.values() if site.kind == budget.quantity)
            return int((~kept).sum()) / there
        parameters, macs = self.costs.saved(name, kept)
        if self.table is not None:
            return next((kind.saved(macs) for kind in self.table.kinds if name in kind.sites), 0.0)
        dense = self.costs.dense
        return parameters / dense.parameters if budget.quantity == "params" else macs / dense.macs

    def share_of_layer(self, budget: Budget, path: str) -> float:
        """Return the share that a whole layer saves."""
        parameters, macs = self.costs.saved_by_layer(path)
        if self.table is not None:
            name = path.rpartition(".")[0]
            return next((kind.saved_by_layer(macs) for kind in self.table.kinds if name in kind.sites), 0.0)
        dense = self.costs.dense
        return parameters / dense.parameters if budget.quantity == "params" else macs / dense.macs

    def outcomes(self, mask: Mask, pruned: nn.Module) -> tuple[BudgetOutcome, ...]:
        """Measure how much is left in the model pruned with `mask`: latency in turn with the model as it was."""
        found = []
        for kind, budget in self.own.items():
            left = self._units_left(kind, mask)
            found.append(BudgetOutcome(budget, left, left))
        if self.joint is not None:
            share, given = self.share(mask), self.cut.latency_table is not None
            reached = share if given else self._measured(self.joint, pruned)
            found.append(BudgetOutcome(self.joint, share, reached, self.table, is_measured=not given))
        return tuple(found)

    def _measured(self, budget: Budget, pruned: nn.Module) -> float:
        if self._dense is None:
            after = measure_cost(pruned, *budget.shape)
            return _ratio(budget, self.costs.dense, after)
        seconds = compare_latency({"dense": self._dense, "pruned": base_of(pruned)}, *budget.shape)
        return median_ratio(seconds["pruned"], seconds["dense"])

    def _rounded(self, scores: Scores, mask: Mask) -> Mask:
        """Give sites the best of their dropped units back where more were measured to be faster."""
        assert self.table is not None
        rows = dict(mask)
        for kind in self.table.kinds:
            for name in kind.sites:
                if name in mask and self.sites[name].group_size == 1:  # a site without scores stays whole
                    more = kind.rounded(int(mask[name].sum())) - int(mask[name].sum())
                    dropped = torch.where(mask[name], -math.inf, scores[name])
                    rows[name] = mask[name].clone()
                    rows[name][dropped.argsort(descending=True, stable=True)[:more]] = True
        return Mask(rows)


@interruptible
def allocate(
    model: nn.Module,
    scores: Scores,
    *,
    budget: AnyBudget,
    allocation: Allocation = "uniform",
    floor: int = 1,
    multiple: int = MULTIPLE,
) -> Mask:
    """Return the mask of the smallest pruning ratio that keeps `model` within a budget, as `budgets_of` reads it.

    The units that may go are those of the kinds that `scores` has. The other arguments are those of `select`. Raises
    `InvalidInputError` for a budget that cannot be reached.
    """
    check_scores(scores)
    check_selection(0, allocation, floor)
    cut = Cut(0, allocation, floor, budgets_of(budget), set(scores.kinds.values()), multiple)
    return BudgetedSelection(model, cut).select(scores)[0]


def _of_kinds(scores: Scores, kinds: Collection[str]) -> Scores | None:
    """Return the scores of these kinds of units alone, None where there are none."""
    sites = [site for site in scores if scores.kinds[site] in kinds]
    return scores.only(sites) if sites else None


def _ratios(scores: Scores, allocation: Allocation, multiple: int) -> list[float]:
    """Return the pruning ratios at which another mask may begin."""
    present = {site: int((vector > -math.inf).sum()) for site, vector in scores.items()}
    if allocation == "ranking":
        total = sum(present.values())
        return [dropped / total for dropped in range(total)]
    steps = {(size, multiple if scores.kinds[site] == "neurons" else 1) for site, size in present.items()}
    return sorted({dropped / size for size, step in steps for dropped in (0, *range(size % step, size, step)) if size})


def _equal_scores(sites: Mapping[str, Site]) -> Scores:
    return PresentScores.of({name: torch.zeros(site.num_units) for name, site in sites.items()}, sites).original(sites)


def _left(budget: Budget, costs: UnitCosts, mask: Mask) -> float:
    return _ratio(budget, costs.dense, costs.after(mask))


def _ratio(budget: Budget, dense: ModelCost, after: ModelCost) -> float:
    return after.parameters / dense.parameters if budget.quantity == "params" else after.macs / dense.macs
