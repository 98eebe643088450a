"""Searching masks by what they do to text representations: no labels, no gradients, one gated pass a mask.

The same search serves twice. While meta-training it finds out which masks are good, and its trials teach the joint
pruner. While pruning it refines the mask that the scores gave, on the task's own texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.errors import invalid
from secateur.heads import HeadMask
from secateur.meta.objective import relational_kl
from secateur.meta.signals import gated_representations


class MaskLoss:
    """The relational KL of masks on fixed texts; the dense pass is made once.

    Batches of a single text are left out, as one text has no relations. Raises `InvalidInputError` where none is left.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], is_pair: bool) -> None:
        self.model, self.is_pair = model, is_pair
        self.batches = [batch for batch in batches if len(next(iter(batch.values()))) > 1]
        if not self.batches:
            raise invalid(
                "texts", "be at least 2 a batch, as masks are judged by the relations between them", "1 or none"
            )
        self.dense = [gated_representations(model, batch, {}, is_pair) for batch in self.batches]

    @torch.no_grad()
    def __call__(self, mask: Mapping[str, Tensor]) -> float:
        """Return the mean over batches of KL(dense ‖ gated), ≥ 0; lower is better."""
        gates = {site: row.float() for site, row in mask.items()}
        values = [
            float(relational_kl(dense, gated_representations(self.model, batch, gates, self.is_pair)))
            for batch, dense in zip(self.batches, self.dense, strict=True)
        ]
        return sum(values) / len(values)


Trial = tuple[HeadMask, float]


def search(
    loss: MaskLoss,
    start: HeadMask,
    groups: Mapping[str, int],
    steps: int,
    random: torch.Generator,
    progress: bool = False,
) -> list[Trial]:
    """Try `steps` masks, each one exchange away from the best so far, and return all of them, the start first.

    `groups` gives each site's number of key-value heads: an exchange swaps a kept and a dropped head, or the patterns
    of two groups, so that every site keeps as many heads in as many groups as at the start.
    """
    best, trials = start, [(start, loss(start))]
    lowest = trials[0][1]
    for _ in tqdm(range(steps), desc="refining", disable=not progress, leave=False):
        mask = exchange(best, groups, random)
        if mask is None:
            break
        trials.append((mask, loss(mask)))
        if trials[-1][1] < lowest:
            best, lowest = trials[-1]
    return trials


def exchange(mask: HeadMask, groups: Mapping[str, int], random: torch.Generator) -> HeadMask | None:
    """Return a mask one random exchange away, or None where every site keeps all of its heads or none."""
    moves = []
    for site, row in mask.items():
        patterns = row.view(groups[site], -1)
        for first in range(len(patterns)):
            kept, dropped = patterns[first].nonzero().flatten(), (~patterns[first]).nonzero().flatten()
            moves += [(site, first, int(a), first, int(b)) for a in kept for b in dropped]
            for second in range(first + 1, len(patterns)):
                if not torch.equal(patterns[first], patterns[second]):
                    moves.append((site, first, -1, second, -1))
    if not moves:
        return None
    site, first, a, second, b = moves[int(torch.randint(len(moves), (1,), generator=random))]
    changed = {name: row.clone() for name, row in mask.items()}
    patterns = changed[site].view(groups[site], -1)
    if a < 0:
        patterns[[first, second]] = patterns[[second, first]]
    else:
        patterns[first, a], patterns[first, b] = False, True
    return HeadMask(changed)
