"""From scores to a mask at a ratio. Lowest scores go first; of equal units the one with the lower index stays."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.support.checks import check_whole, is_number
from secateur.support.defaults import MULTIPLE
from secateur.units.masks import Mask, PresentMask
from secateur.units.scores import PresentScores, Scores

Allocation = Literal["uniform", "ranking"]
"""How many units each site keeps: the same share everywhere, as in the paper, or by one ranking of the whole model."""

AnyScores = Scores | PresentScores


@overload
def select(
    scores: Scores, pruning_ratio: float = ..., allocation: Allocation = ..., floor: int = ..., multiple: int = ...
) -> Mask: ...
@overload
def select(
    scores: PresentScores,
    pruning_ratio: float = ...,
    allocation: Allocation = ...,
    floor: int = ...,
    multiple: int = ...,
) -> PresentMask: ...
def select(
    scores: Scores | PresentScores,
    pruning_ratio: float = 0.5,
    allocation: Allocation = "uniform",
    floor: int = 1,
    multiple: int = MULTIPLE,
) -> Mask | PresentMask:
    """Return the mask that removes `pruning_ratio` of the units that `scores` says are there.

    Args:
        scores: importance of every unit, higher = keep; removed units (-inf) stay removed. The mask is in their
            numbering: a `Mask` for `Scores`, a `PresentMask` for `PresentScores`.
        pruning_ratio: fraction of units to remove, in [0, 1). Never more than this are removed; where units come in
            groups that must go together it can be fewer.
        allocation: "uniform" removes the same fraction at every site (the paper's way), "ranking" ranks the units of
            the whole model together.
        floor: units that every site keeps at least, ≥ 0; where units are grouped, it counts whole groups' units.
        multiple: neurons that stay at a site are a multiple of this, which processors want; more stay than the ratio
            asks for where it is none, and all where there are no more than this.

    Groups, as of heads that read one key-value head: with allocation "uniform" a site keeps some of its groups and the
    same number of units in each, whichever choice has the highest sum of scores among those nearest to the budget; with
    "ranking" whole groups go, ranked by their mean score, up to the first that is more than the ratio leaves to remove:
    a larger ratio takes all that a smaller one takes.

    Where `scores` has interactions, units of a site without groups are then rearranged (Kwon et al. 2022, arXiv
    2204.09656): kept units, from the lowest score up, are swapped for the dropped one with which that lowers the cost
    of all dropped units together most, if any does. Every site keeps as many units as before.

    Raises `InvalidInputError` for values outside their ranges.
    """
    check_selection(pruning_ratio, allocation, floor)
    check_whole("multiple", multiple)
    check_scores(scores)
    if allocation == "uniform":
        rows = {site: _select_in_site(scores, site, pruning_ratio, floor) for site in scores}
    else:
        rows = _select_by_ranking(scores, pruning_ratio, floor)
    for site, kind in scores.kinds.items():
        if kind == "neurons":
            rows[site] = _filled(rows[site], scores[site], multiple)
    for site in scores.interactions:
        if not has_groups(scores, site):
            rows[site] = _rearranged(rows[site], scores[site], scores.interactions[site])
    return Mask(rows) if isinstance(scores, Scores) else PresentMask(rows)


def check_scores(scores: Any) -> None:
    """Raise `InvalidInputError` unless these are scores."""
    if not isinstance(scores, Scores | PresentScores):
        remedy = f"load it: secateur.Scores.load({str(scores)!r})" if isinstance(scores, str | Path) else ""
        raise invalid("scores", "be Scores", type(scores).__name__, remedy)


def check_selection(pruning_ratio: float, allocation: str, floor: int) -> None:
    """Raise `InvalidInputError` unless `select` takes these, whatever the scores are."""
    check_pruning_ratio(pruning_ratio)
    if allocation not in get_args(Allocation):
        raise invalid("allocation", "be 'uniform' or 'ranking'", allocation)
    check_whole("floor", floor, 0)


def check_pruning_ratio(pruning_ratio: float) -> None:
    """Raise `InvalidInputError` unless the ratio is a number in [0, 1)."""
    if isinstance(pruning_ratio, bool) or not isinstance(pruning_ratio, int | float) or not 0 <= pruning_ratio < 1:
        is_percentage = is_number(pruning_ratio, above=1) and pruning_ratio < 100
        guess = f"did you mean {pruning_ratio / 100:g}?" if is_percentage else ""
        raise invalid("pruning_ratio", "be in [0, 1)", pruning_ratio, guess)


def removable(units: int, pruning_ratio: float) -> int:
    """Return how many of `units` may go; the small term undoes rounding, as in 0.29 * 100 = 28.999…"""
    return math.floor(pruning_ratio * units + 1e-9)


def _filled(kept: Tensor, vector: Tensor, multiple: int) -> Tensor:
    """Return `kept` with the best units of the others added until their number is a multiple."""
    count = int(kept.sum())
    more = min(math.ceil(count / multiple) * multiple, int((vector > -math.inf).sum())) - count
    kept = kept.clone()
    kept[torch.argsort(torch.where(kept, -math.inf, vector), descending=True, stable=True)[:more]] = True
    return kept


def _ranked(vector: Tensor) -> list[int]:
    """Return indices from the highest score to the lowest, earlier units first among equals."""
    return torch.argsort(vector, descending=True, stable=True).tolist()


def has_groups(scores: AnyScores, site: str) -> bool:
    """Return whether units of a site may share weights; thousands of neurons do not."""
    return scores.num_groups[site] < scores[site].numel()


def _groups_of(scores: AnyScores, site: str) -> list[list[int]]:
    """Return, for each group that is there, its units that are there."""
    rows = torch.arange(scores[site].numel()).view(scores.num_groups[site], -1).tolist()
    there = (scores[site] > -math.inf).tolist()
    present = [[unit for unit in row if there[unit]] for row in rows]
    return [row for row in present if row]


def _importance(scores: AnyScores, site: str) -> Tensor:
    """Return the scores of a site, infinite for the units that stay whatever their score."""
    staying = scores.staying.get(site, []) if isinstance(scores, Scores) else []
    return scores[site].index_fill(0, torch.tensor(staying, dtype=torch.int64), math.inf) if staying else scores[site]


def _select_in_site(scores: AnyScores, site: str, pruning_ratio: float, floor: int) -> Tensor:
    vector = _importance(scores, site)
    kept = torch.zeros(vector.numel(), dtype=torch.bool)
    present = int((vector > -math.inf).sum())
    staying = int((vector == math.inf).sum())
    target = max(present - removable(present, pruning_ratio), min(floor, present), staying)
    if not target:
        return kept
    if not has_groups(scores, site):
        kept[_ranked(vector)[:target]] = True
        return kept
    groups = _groups_of(scores, site)
    shapes = list(itertools.product(range(1, len(groups) + 1), range(1, max(map(len, groups)) + 1)))
    nearest = min(g * m for g, m in shapes if g * m >= target)
    choices = [_best_of_shape(vector, groups, g, m) for g, m in shapes if g * m == nearest]
    kept[max(choices, key=lambda chosen: float(vector[chosen].sum()))] = True
    return kept


def _best_of_shape(vector: Tensor, groups: list[list[int]], num_groups: int, per_group: int) -> list[int]:
    """Return the best `per_group` units of the `num_groups` groups where they add up to most."""
    best = [sorted(group, key=lambda unit: (-float(vector[unit]), unit))[:per_group] for group in groups]
    order = _ranked(torch.stack([vector[units].sum() for units in best]))
    return [unit for g in order[:num_groups] for unit in best[g]]


def _select_by_ranking(scores: AnyScores, pruning_ratio: float, floor: int) -> dict[str, Tensor]:
    units = [(site, group) for site in scores for group in _groups_of(scores, site)]
    values = {site: vector > -math.inf for site, vector in scores.items()}
    left = {site: int(there.sum()) for site, there in values.items()}
    allowed = removable(sum(left.values()), pruning_ratio)
    if not units:  # every unit is gone already
        return values
    means = torch.cat([_means(scores, site) for site in scores])
    stays = (means == math.inf).tolist()
    going: dict[str, list[int]] = {site: [] for site in scores}
    for number in reversed(_ranked(means)):
        site, group = units[number]
        if stays[number] or left[site] - len(group) < floor:
            continue
        if len(group) > allowed:
            break
        going[site] += group
        allowed -= len(group)
        left[site] -= len(group)
    for site, gone in going.items():
        values[site][gone] = False
    return values


def _means(scores: AnyScores, site: str) -> Tensor:
    """Return the mean score of each group of a site that is there."""
    vector = _importance(scores, site)
    if not has_groups(scores, site):
        return vector[vector > -math.inf]
    return torch.tensor([float(vector[group].mean()) for group in _groups_of(scores, site)], dtype=vector.dtype)


def _rearranged(kept: Tensor, vector: Tensor, matrix: Tensor) -> Tensor:
    """Swap kept units of a site against dropped ones while the sum of `matrix` over the dropped ones falls."""
    kept = kept.clone()
    for unit in reversed(_ranked(torch.where(kept, vector, -math.inf))[: int(kept.sum())]):
        dropped = (~kept & (vector > -math.inf)).nonzero().flatten()
        if not len(dropped):
            break
        sums = matrix[:, dropped].sum(dim=1)
        # What the sum over the dropped units gains when `unit` joins them and one of them, in turn, leaves.
        gains = (
            matrix[unit, unit] + 2 * (sums[unit] - matrix[unit, dropped])
            - 2 * sums[dropped] + matrix[dropped, dropped]
        )  # fmt: skip
        best = int(gains.argmin())
        if float(gains[best]) < 0:
            kept[unit], kept[dropped[best]] = False, True
    return kept
