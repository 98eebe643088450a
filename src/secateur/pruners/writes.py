"""What heads write into the residual stream: their part of the output projection, norms of it and through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.models.fetched import weight_of
from secateur.sites.layout import NOBODY, AttentionSite

FINGERPRINT = 32
"""Numbers that tell a head from others."""


def output_weights(model: Any, site: AttentionSite) -> Tensor:
    """Return each head's part of the output projection, `[heads, width, model width]`, float32."""
    piece = next(p for p in site.slices_of("output") if model.get_parameter(p.parameter).ndim == 2)
    weight = weight_of(model, piece.parameter).float()
    rows = weight if piece.axis == 0 else weight.T  # [heads · width, model width]
    owners = torch.tensor(piece.owners)
    order = torch.argsort(owners, stable=True)
    return rows[order[owners[order] != NOBODY]].view(site.num_units, -1, rows.shape[1])


def gram_matrices(model: Any, site: AttentionSite) -> Tensor:
    """Return W_O^h (W_O^h)ᵀ of every head: `[heads, width, width]`, float32."""
    weights = output_weights(model, site)
    return weights @ weights.transpose(1, 2)


def contribution_norms(outputs: Tensor, grams: Tensor) -> Tensor:
    """Return ‖outputs W_O‖: outputs `[batch, tokens, heads, width]` → norms `[batch, tokens, heads]`."""
    x = outputs.float()
    squared = (torch.einsum("bthi,hij->bthj", x, grams.to(x.device)) * x).sum(dim=-1)
    return squared.clamp(min=0).sqrt()


def fingerprints_of(weights: Tensor) -> Tensor:
    """Return what tells heads from others, whatever they read: `[heads, FINGERPRINT]`.

    `weights` are their parts of the output projection, `[heads, width, model width]`; the norms of the rows, over again
    where there are fewer.
    """
    norms = weights.norm(dim=2)
    return norms[:, torch.arange(FINGERPRINT, device=norms.device) % norms.shape[1]].cpu()
