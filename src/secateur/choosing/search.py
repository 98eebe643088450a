"""A search for a mask that costs less, on a task's own texts: exchange heads, and keep what lowers the loss.

The gates are free parameters, whose gradient says which exchange of heads to try next.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from secateur.choosing.mask_loss import MaskLoss, MeanLoss
from secateur.units.masks import PresentMask
from secateur.units.select import Allocation

Trial = tuple[PresentMask, float]
"""A mask, and what it costs."""

Exchange = tuple[int, ...]
"""The heads whose verdict changes, numbered over all sites."""


def search(
    loss: MaskLoss | MeanLoss,
    start: PresentMask,
    kv_groups: Mapping[str, int],
    steps: int,
    random: torch.Generator,
    allocation: Allocation = "uniform",
    floor: int = 1,
    progress: bool = False,
    staying: Mapping[str, Tensor] | None = None,
) -> list[Trial]:
    """Try up to `steps` masks, each an exchange away from the best so far, and return all of them, the start first.

    The next exchange is the one that promises most. What closing a head, or opening it, will change is taken from the
    loss's slope on its gate, which holds for small changes alone: so each exchange that fails to keep its promise
    shares the difference out among its heads, and others that count on the same heads wait. `random` orders those that
    promise the same. It ends early where every exchange of the best mask was tried. See `exchanges` for the other
    arguments.
    """
    best, trials = start, [(start, loss(start))]
    lowest = trials[0][1]
    guesses: _Guesses | None = None
    for _ in tqdm(range(steps), desc="refining", disable=not progress, leave=False):
        if guesses is None:
            moves = exchanges(best, kv_groups, allocation, floor, staying)
            flat = torch.cat(list(best.values()))
            guesses = _Guesses(moves, torch.where(flat, -1.0, 1.0) * loss.slopes(best), random)
        move = guesses.next()
        if move is None:
            break
        mask = _exchanged(best, move)
        value = loss(mask)
        trials.append((mask, value))
        if value < lowest:
            best, lowest, guesses = mask, value, None
        else:
            guesses.learn(value - lowest)
    return trials


class _Guesses:
    """What each exchange promises: the sum of what closing or opening each of its heads is thought to change."""

    def __init__(self, moves: Sequence[Exchange], changes: Tensor, random: torch.Generator) -> None:
        self.moves = [moves[i] for i in torch.randperm(len(moves), generator=random).tolist()]
        self.changes = torch.cat([changes.double(), torch.zeros(1, dtype=torch.float64)])  # the last one pads
        most = max(map(len, moves), default=0)
        self.heads = torch.tensor([[*move, *[len(changes)] * (most - len(move))] for move in self.moves])
        self.tried = torch.zeros(len(moves), dtype=torch.bool)

    def next(self) -> Exchange | None:
        """Return the heads of the most promising exchange that was not tried, or None after the last."""
        if bool(self.tried.all()):
            return None
        promises = self.changes[self.heads].sum(dim=1).masked_fill(self.tried, torch.inf)
        self.last = int(promises.argmin())
        self.promise = float(promises[self.last])
        self.tried[self.last] = True
        return self.moves[self.last]

    def learn(self, change: float) -> None:
        """Take in by how much the loss did change with the last exchange."""
        move = self.moves[self.last]
        self.changes[list(move)] += (change - self.promise) / len(move)


@dataclass(frozen=True)
class _Group:
    """The heads of a site that read one key-value head: the number of the first, and of all, which are kept and stay.

    `kept` and `stays` hold a verdict for each head; what stays is kept.
    """

    site: str
    first: int
    kept: list[bool]
    stays: list[bool]


def exchanges(
    mask: PresentMask,
    kv_groups: Mapping[str, int],
    allocation: Allocation = "uniform",
    floor: int = 1,
    staying: Mapping[str, Tensor] | None = None,
) -> list[Exchange]:
    """Return every exchange that leaves as many heads.

    `kv_groups` gives each site's number of key-value heads. An exchange swaps a kept and a dropped head of a group, or
    the patterns of two groups of heads: with allocation "uniform" of one site, so that every site keeps as many heads
    in as many groups; with allocation "ranking" of any two sites, of which none falls below `floor` that has more.
    Heads in `staying` (bool, by site), where `mask` keeps them, are never dropped.
    """
    groups = _groups(mask, kv_groups, staying)
    found: list[Exchange] = [
        (group.first + a, group.first + b)
        for group in groups
        for a, b in itertools.product(range(len(group.kept)), repeat=2)
        if group.kept[a] and not group.kept[b] and not group.stays[a]
    ]
    heads = {site: int(vector.sum()) for site, vector in mask.items()}
    for one, other in itertools.combinations(groups, 2):
        if len(one.kept) != len(other.kept) or (one.site != other.site and allocation == "uniform"):
            continue
        gain = sum(other.kept) - sum(one.kept)
        changes = ((heads[one.site], gain), (heads[other.site], -gain)) if one.site != other.site else ()
        if any(change < 0 and number + change < floor for number, change in changes):
            continue
        differ = [i for i, (a, b) in enumerate(zip(one.kept, other.kept, strict=True)) if a != b]
        if differ and not any(one.stays[i] or other.stays[i] for i in differ):
            found.append((*(one.first + i for i in differ), *(other.first + i for i in differ)))
    return found


def _groups(mask: PresentMask, kv_groups: Mapping[str, int], staying: Mapping[str, Tensor] | None) -> list[_Group]:
    groups = []
    first = 0
    for site, vector in mask.items():
        stay = torch.zeros_like(vector) if staying is None else staying[site] & vector
        for kept, stays in zip(vector.view(kv_groups[site], -1), stay.view(kv_groups[site], -1), strict=True):
            groups.append(_Group(site, first, kept.tolist(), stays.tolist()))
            first += len(kept)
    return groups


def _exchanged(mask: PresentMask, move: Exchange) -> PresentMask:
    flat = torch.cat(list(mask.values()))
    flat[list(move)] = ~flat[list(move)]
    return PresentMask(dict(zip(mask, flat.split([len(row) for row in mask.values()]), strict=True)))
