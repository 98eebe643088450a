"""What tells the pruner which way to go: the paper's straight-through gradient, and estimates without one.

Each works on one batch, in parts of like length: `model` is the frozen base model, `dense` its representations
`[texts, width]` of the batch, `scores` the pruner's for each site's heads, with gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.sampling import draw_heads, draw_whole_sites, drop_dimensions
from secateur.meta_training.subjects import Parts
from secateur.relations import gated_representations, relational_kl
from secateur.units.masks import vector_of
from secateur.units.select import removable


def straight_through_loss(
    model: PreTrainedModel,
    batch: Parts,
    dense: Tensor,
    scores: Mapping[str, Tensor],
    is_pair: bool,
    config: MetaTrainingConfig,
    random: torch.Generator,
) -> Tensor:
    """Gate the heads that the scores draw and return the relational loss (paper, steps 3 to 5)."""
    whole = draw_whole_sites(len(scores), config.whole_sites, random)
    gates = {
        site: draw_heads(row, num_kept(len(row), config.pruning_ratio), random, config.temperature)
        for number, (site, row) in enumerate(scores.items())
        if number not in whole
    }
    kept = drop_dimensions(dense.shape[1], config.dropped_dimensions, random).to(dense)
    pruned = _represented(model, batch, gates, is_pair)
    return relational_kl(dense * kept, pruned * kept) * (1.0 if is_pair else config.single_weight)


def _represented(model: PreTrainedModel, batch: Parts, gates: Mapping[str, Tensor], is_pair: bool) -> Tensor:
    return batch.joined(gated_representations(model, part, gates, is_pair) for part in batch.batches)


@torch.no_grad()
def leave_one_out_estimate(
    model: PreTrainedModel, batch: Parts, dense: Tensor, heads: Mapping[str, int], is_pair: bool
) -> dict[str, Tensor]:
    """Return, for each head, the relational KL when it alone is gated: `[heads]` a site, ≥ 0, one pass a head."""
    found = {site: torch.zeros(count) for site, count in heads.items()}
    for site, count in heads.items():
        for head in range(count):
            gate = (~vector_of([head], count)).float()
            found[site][head] = relational_kl(dense, _represented(model, batch, {site: gate}, is_pair))
    return found


@torch.no_grad()
def random_masks_estimate(
    model: PreTrainedModel,
    batch: Parts,
    dense: Tensor,
    heads: Mapping[str, int],
    is_pair: bool,
    config: MetaTrainingConfig,
    random: torch.Generator,
) -> dict[str, Tensor]:
    """Return, for each head, the mean KL of random masks that drop it less that of masks that keep it: `[heads]`.

    Masks come in pairs, one and its complement, so that every head is dropped as often as it is kept, and they drop
    half of every site: unlike leaving one out, this sees what a head is worth when many others are gone.
    """
    sums = {site: torch.zeros(2, count) for site, count in heads.items()}
    for _ in range(config.random_masks // 2):
        half = {site: torch.randperm(count, generator=random) < count // 2 for site, count in heads.items()}
        for mask in (half, {site: ~row for site, row in half.items()}):
            gates = {site: row.float() for site, row in mask.items()}
            loss = float(relational_kl(dense, _represented(model, batch, gates, is_pair)))
            for site, row in mask.items():
                sums[site][0][~row] += loss
                sums[site][1][row] += loss
    pairs = config.random_masks // 2
    return {site: (dropped - kept) / pairs for site, (dropped, kept) in sums.items()}


def ranking_loss(scores: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Return 1 - correlation of scores and targets over the heads of a site, averaged over sites: in [0, 2].

    Only the order and spacing within a site count, as in the paper's selection; a site of one head counts nothing.
    """
    losses = []
    for site, row in scores.items():
        target = targets[site].to(row)
        if len(row) > 1:
            a, b = row - row.mean(), target - target.mean()
            losses.append(1 - (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12))
    return torch.stack(losses).mean()


def num_kept(heads: int, pruning_ratio: float) -> int:
    """Return how many of a site's heads stay: all but floor(ratio · heads)."""
    return heads - removable(heads, pruning_ratio)
