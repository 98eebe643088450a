"""How much a head writes: the size of the vector it adds to the residual stream, read in the one dense pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.model.layout import NOBODY, AttentionSite
from secateur.model.offload import weight_of
from secateur.model.probe import HeadReading
from secateur.scorers.base import Batch, ScoringTask, StreamingScorer, mean_over_tokens


class ContributionScorer(StreamingScorer):
    """Mean over real tokens, then over texts, of ‖(A_h V_h) W_O^h‖.

    The norm of x W is the square root of x (W Wᵀ) xᵀ, so each head's Gram matrix `[width, width]` stands for its part
    of the output projection, and no vector as wide as the model is ever made for every head. Where a model multiplies
    its heads by gates of their own before the projection (Qwen3-Next), A_h V_h is what the gate is given.
    """

    description = "mean norm of the vector that a head adds to the residual stream"
    source = "this project; norms of value-weighted vectors are due to Kobayashi et al. 2020 (arXiv 2004.10102)"

    def __init__(self) -> None:
        self._grams: dict[str, Tensor] = {}

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Prepare each head's Gram matrix, then stream the batches."""
        self._grams = {name: gram_matrices(task.model, site) for name, site in task.sites.items() if site.num_heads}
        try:
            return super().score(task)
        finally:
            self._grams = {}

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return the mean contribution norm of each text and head."""
        if reading.site not in self._grams:  # emptied by an earlier pruning
            return reading.outputs.new_zeros(len(reading.outputs), 0)
        norms = contribution_norms(reading.outputs, self._grams[reading.site])
        return mean_over_tokens(norms, batch.get("attention_mask"))


def output_weights(model: Any, site: AttentionSite) -> Tensor:
    """Return each head's part of the output projection, `[heads, width, model width]`, float32."""
    piece = next(p for p in site.slices_of("output") if model.get_parameter(p.parameter).ndim == 2)
    weight = weight_of(model, piece.parameter).float()
    rows = weight if piece.axis == 0 else weight.T  # [heads · width, model width]
    owners = torch.tensor(piece.owners)
    order = torch.argsort(owners, stable=True)
    return rows[order[owners[order] != NOBODY]].view(site.num_heads, -1, rows.shape[1])


def gram_matrices(model: Any, site: AttentionSite) -> Tensor:
    """Return W_O^h (W_O^h)ᵀ of every head: `[heads, width, width]`, float32."""
    weights = output_weights(model, site)
    return weights @ weights.transpose(1, 2)


def contribution_norms(outputs: Tensor, grams: Tensor) -> Tensor:
    """Return ‖outputs W_O‖: outputs `[batch, tokens, heads, width]` → norms `[batch, tokens, heads]`."""
    x = outputs.float()
    squared = (torch.einsum("bthi,hij->bthj", x, grams.to(x.device)) * x).sum(dim=-1)
    return squared.clamp(min=0).sqrt()
