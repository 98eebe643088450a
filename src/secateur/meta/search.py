"""Searching masks by what they do to text representations: no labels, no gradients, one gated pass a mask.

The same search serves twice. While meta-training it finds out which masks are good, and its trials teach the joint
pruner. While pruning it refines the mask that the scores gave, on the task's own texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.heads import HeadMask
from secateur.meta.objective import relational_kl, with_relations
from secateur.meta.signals import gated_representations
from secateur.processes import in_order
from secateur.selection import Scope


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
    def __call__(self, mask: Mapping[str, Tensor]) -> float:
        """Return the mean over batches of KL(dense ‖ gated), ≥ 0; lower is better."""
        gates = {site: row.float() for site, row in mask.items()}

        def judge(number: int) -> float:
            if number not in self.dense:
                self.dense[number] = self._representations(number, {})
            return float(relational_kl(self.dense[number], self._representations(number, gates)))

        values = list(in_order(judge, range(len(self.batches)), self.accelerator))
        return sum(values) / len(values)

    def _representations(self, number: int, gates: Mapping[str, Tensor]) -> Tensor:
        return gated_representations(self.model, self.batches[number], gates, self.is_pair)


Trial = tuple[HeadMask, float]


def search(
    loss: MaskLoss,
    start: HeadMask,
    groups: Mapping[str, int],
    steps: int,
    random: torch.Generator,
    scope: Scope = "site",
    min_heads: int = 1,
    progress: bool = False,
    staying: Mapping[str, Tensor] | None = None,
) -> list[Trial]:
    """Try `steps` masks, each one exchange away from the best so far, and return all of them, the start first.

    See `exchange` for the other arguments.
    """
    best, trials = start, [(start, loss(start))]
    lowest = trials[0][1]
    for _ in tqdm(range(steps), desc="refining", disable=not progress, leave=False):
        mask = exchange(best, groups, random, scope, min_heads, staying)
        if mask is None:
            break
        trials.append((mask, loss(mask)))
        if trials[-1][1] < lowest:
            best, lowest = trials[-1]
    return trials


def exchange(
    mask: HeadMask,
    groups: Mapping[str, int],
    random: torch.Generator,
    scope: Scope = "site",
    min_heads: int = 1,
    staying: Mapping[str, Tensor] | None = None,
) -> HeadMask | None:
    """Return a mask one random exchange away, with as many heads, or None where there is none.

    `groups` gives each site's number of key-value heads. An exchange swaps a kept and a dropped head of a group, or the
    patterns of two groups of heads: at scope "site" of one site, so that every site keeps as many heads in as many
    groups; at scope "global" of any two sites, of which none falls below `min_heads` that has more. Heads in `staying`
    (bool, by site), where `mask` keeps them, are never dropped.
    """
    patterns = [
        (site, number, tuple(row))
        for site, vector in mask.items()
        for number, row in enumerate(vector.view(groups[site], -1).tolist())
    ]
    kept = {site: int(vector.sum()) for site, vector in mask.items()}
    stay: dict[tuple[str, int], list[int]] = {}
    for site, number, row in patterns:
        group = [] if staying is None else staying[site].view(groups[site], -1)[number].tolist()
        stay[site, number] = [i for i, stays in enumerate(group) if stays and row[i]]

    def may_become(site: str, number: int, pattern: tuple[bool, ...]) -> bool:
        return all(pattern[i] for i in stay[site, number])

    moves: list[tuple[str, int, tuple[bool, ...], str, int, tuple[bool, ...]]] = []
    for site, number, row in patterns:
        for a, b in itertools.product(range(len(row)), repeat=2):
            if row[a] and not row[b]:
                swapped = tuple({a: False, b: True}.get(i, value) for i, value in enumerate(row))
                if may_become(site, number, swapped):
                    moves.append((site, number, swapped, site, number, swapped))
    for (site, number, row), (other, second, pattern) in itertools.combinations(patterns, 2):
        gain = sum(pattern) - sum(row)
        if row == pattern or len(row) != len(pattern) or (site != other and scope == "site"):
            continue
        changes = ((kept[site], gain), (kept[other], -gain)) if site != other else ()
        if any(change < 0 and heads + change < min_heads for heads, change in changes):
            continue
        if not (may_become(site, number, pattern) and may_become(other, second, row)):
            continue
        moves.append((site, number, pattern, other, second, row))
    if not moves:
        return None
    site, number, row, other, second, pattern = moves[int(torch.randint(len(moves), (1,), generator=random))]
    changed = {name: vector.clone() for name, vector in mask.items()}
    for name, place, values in ((site, number, row), (other, second, pattern)):
        changed[name].view(groups[name], -1)[place] = torch.tensor(values)
    return HeadMask(changed)
