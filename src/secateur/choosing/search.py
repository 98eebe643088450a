"""Masks judged, and refined, by what they do to text representations: no labels, a gated pass for each mask.

`MaskLoss` is the judge; what it says of masks also teaches the joint pruner. `search` refines the mask that scores gave
on the task's own texts: the gates as free parameters, whose gradient says which exchange of heads to try next.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.models.offload import is_offloaded
from secateur.relations import gated_representations, relational_kl, with_relations
from secateur.support.processes import in_order
from secateur.texts.halving import is_out_of_memory
from secateur.units.masks import PresentMask
from secateur.units.select import Allocation


class MaskLoss:
    """The relational KL of masks on fixed texts; the dense pass is made once.

    The processes of `accelerator`, if any, judge a share of the batches each and get the same loss. Batches of one or
    two texts are left out, as they have no relations. Raises `InvalidInputError` where none is left.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Mapping[str, Any]],
        is_pair: bool,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model, self.is_pair, self.accelerator = model, is_pair, accelerator
        self.batches = with_relations(batches)
        self.dense: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, mask: PresentMask) -> float:
        """Return the mean over batches of KL(dense ‖ gated), ≥ 0; lower is better."""
        gates = {site: row.float() for site, row in mask.items()}

        def judge(number: int) -> float:
            if number not in self.dense:
                self.dense[number] = self._representations(number, {})
            return float(relational_kl(self.dense[number], self._representations(number, gates)))

        values = list(in_order(judge, range(len(self.batches)), self.accelerator))
        return sum(values) / len(values)

    def slopes(self, mask: PresentMask) -> Tensor:
        """Return the loss's derivative on every gate of a judged mask, `[heads]` over all sites.

        Zeros where the model has no gradients to give: weights that are fetched layer by layer, kernels without a
        backward pass. Each batch takes about as long as three masks.
        """
        heads = sum(len(row) for row in mask.values())

        def differentiate(number: int) -> Tensor:
            gates = {site: row.float().requires_grad_() for site, row in mask.items()}
            try:
                with torch.enable_grad():
                    loss = relational_kl(self.dense[number], self._representations(number, gates))
                found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                return torch.zeros(heads)
            return torch.cat(found).nan_to_num(0.0, 0.0, 0.0)

        if is_offloaded(self.model):
            return torch.zeros(heads)
        found = list(in_order(differentiate, range(len(self.batches)), self.accelerator))
        return torch.stack(found).mean(dim=0)

    def _representations(self, number: int, gates: Mapping[str, Tensor]) -> Tensor:
        return gated_representations(self.model, self.batches[number], gates, self.is_pair)


class MeanLoss:
    """The mean of several `MaskLoss`es on as many texts each, as one."""

    def __init__(self, losses: Sequence[MaskLoss]) -> None:
        self.losses = losses

    def __call__(self, mask: PresentMask) -> float:
        """Return the mean of what the mask costs."""
        return statistics.fmean(loss(mask) for loss in self.losses)

    def slopes(self, mask: PresentMask) -> Tensor:
        """Return the mean of the derivatives on every gate of a judged mask, `[heads]` over all sites."""
        return torch.stack([loss.slopes(mask) for loss in self.losses]).mean(dim=0)


Trial = tuple[PresentMask, float]


def search(
    loss: MaskLoss | MeanLoss,
    start: PresentMask,
    groups: Mapping[str, int],
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
            moves = exchanges(best, groups, allocation, floor, staying)
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

    def __init__(self, moves: Sequence[tuple[int, ...]], changes: Tensor, random: torch.Generator) -> None:
        self.moves = [moves[i] for i in torch.randperm(len(moves), generator=random).tolist()]
        self.changes = torch.cat([changes.double(), torch.zeros(1, dtype=torch.float64)])  # the last one pads
        most = max(map(len, moves), default=0)
        self.heads = torch.tensor([[*move, *[len(changes)] * (most - len(move))] for move in self.moves])
        self.tried = torch.zeros(len(moves), dtype=torch.bool)

    def next(self) -> tuple[int, ...] | None:
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


def exchanges(
    mask: PresentMask,
    groups: Mapping[str, int],
    allocation: Allocation = "uniform",
    floor: int = 1,
    staying: Mapping[str, Tensor] | None = None,
) -> list[tuple[int, ...]]:
    """Return every exchange that leaves as many heads: the heads whose verdict changes, numbered over all sites.

    `groups` gives each site's number of key-value heads. An exchange swaps a kept and a dropped head of a group, or the
    patterns of two groups of heads: with allocation "uniform" of one site, so that every site keeps as many heads in as many
    groups; with allocation "ranking" of any two sites, of which none falls below `floor` that has more. Heads in `staying`
    (bool, by site), where `mask` keeps them, are never dropped.
    """
    rows: list[tuple[str, int, list[bool], list[bool]]] = []  # a group's site, first head, and which are kept, and stay
    first = 0
    for site, vector in mask.items():
        stay = torch.zeros_like(vector) if staying is None else staying[site] & vector
        for kept, stays in zip(vector.view(groups[site], -1), stay.view(groups[site], -1), strict=True):
            rows.append((site, first, kept.tolist(), stays.tolist()))
            first += len(kept)
    heads = {site: int(vector.sum()) for site, vector in mask.items()}
    found: list[tuple[int, ...]] = []
    for _, first, kept, stays in rows:
        for a, b in itertools.product(range(len(kept)), repeat=2):
            if kept[a] and not kept[b] and not stays[a]:
                found.append((first + a, first + b))
    for (site, first, kept, stays), (other, second, others, others_stay) in itertools.combinations(rows, 2):
        if len(kept) != len(others) or (site != other and allocation == "uniform"):
            continue
        differ = [i for i, (a, b) in enumerate(zip(kept, others, strict=True)) if a != b]
        gain = sum(others) - sum(kept)
        changes = ((heads[site], gain), (heads[other], -gain)) if site != other else ()
        if any(change < 0 and number + change < floor for number, change in changes):
            continue
        if differ and not any(stays[i] or others_stay[i] for i in differ):
            found.append((*(first + i for i in differ), *(second + i for i in differ)))
    return found


def _exchanged(mask: PresentMask, move: tuple[int, ...]) -> PresentMask:
    flat = torch.cat(list(mask.values()))
    flat[list(move)] = ~flat[list(move)]
    return PresentMask(dict(zip(mask, flat.split([len(row) for row in mask.values()]), strict=True)))
