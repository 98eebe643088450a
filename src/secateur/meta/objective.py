"""Text representations and the relational loss between two sets of them (paper, steps 2 and 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError, invalid

SCALE = 10.0
"""What the paper multiplies similarities by before the softmax."""


def represent(model: nn.Module, outputs: Any, batch: Mapping[str, Tensor], is_pair: bool) -> Tensor:
    """Return one vector for each text, `[batch, width]` (paper, step 2).

    Pairs: the pooler's output for the first token, or that token's last hidden state where the model has no pooler.
    Singles: the mean of the last hidden states over real tokens. A causal model's first token sees nothing but itself,
    so there pairs are represented by the mean too.
    """
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3:
        raise UnsupportedModelError(f"{type(model).__name__} returns no last hidden states `[batch, tokens, width]`")
    if is_pair and not any(getattr(module, "is_causal", False) for module in model.modules()):
        pooled = getattr(outputs, "pooler_output", None)
        return hidden[:, 0] if pooled is None else pooled
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1)
    weights = mask.to(hidden).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def relations(representations: Tensor, scale: float = SCALE) -> Tensor:
    """Return log-probabilities of which of two neighbouring similarities is larger, `[n·n // 2, 2]` (paper, step 5).

    Representations `[n, width]` are centred by their mean and scaled to length 1; their similarities × `scale` are
    read row by row and cut into consecutive pairs, with a softmax over each. An odd last similarity is left out.
    """
    if representations.ndim != 2 or len(representations) < 2:
        raise invalid("representations", "hold at least 2 texts, [texts, width]", tuple(representations.shape))
    centred = representations - representations.mean(dim=0)
    rows = torch.nn.functional.normalize(centred, dim=1)
    similarities = (rows @ rows.T).flatten() * scale
    return similarities[: len(similarities) // 2 * 2].view(-1, 2).log_softmax(dim=1)


def relational_kl(dense: Tensor, pruned: Tensor, scale: float = SCALE) -> Tensor:
    """Return the mean elementwise KL(dense ‖ pruned) between the relations of two sets of representations: ≥ 0 overall.

    Both are `[texts, width]`, of the same texts in the same order; 0 = the texts relate to each other as before. The
    mean is over the single entries of all pairs, half of the mean over pairs. Differentiable.
    """
    if dense.shape != pruned.shape:
        raise invalid("pruned", f"have the shape of `dense`, {tuple(dense.shape)}", tuple(pruned.shape))
    entries = torch.nn.functional.kl_div(
        relations(pruned.float(), scale), relations(dense.float(), scale), reduction="none", log_target=True
    )
    return entries.mean()
