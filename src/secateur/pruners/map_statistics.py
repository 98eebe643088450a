"""What attention maps look like, in a few numbers for each head."""

from __future__ import annotations

import torch
from torch import Tensor


def map_statistics(weights: Tensor, real: Tensor) -> Tensor:
    """Return each text's mean over real queries of what its rows look like: `[batch, heads, MAP_FEATURES]`.

    `weights` are maps `[batch, heads, queries, keys]`; `real` `[batch, tokens]` is 1 for a token, 0 for padding, and
    counts along the axes of its length.
    """
    texts, heads, queries, keys = weights.shape
    rows = real if queries == real.shape[1] else torch.ones(texts, queries, device=weights.device)
    share = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
    lengths = (real.sum(dim=1) if keys == real.shape[1] else torch.full((texts,), float(keys))).to(weights)

    def mean(values: Tensor) -> Tensor:
        return torch.einsum("bhq,bq->bh", values, share)

    # Weights of 0 count 0. PyTorch's functions for x log x are two to three times as slow on a CPU.
    entropy = -weights.clamp(min=torch.finfo(weights.dtype).tiny).log().mul_(weights).sum(dim=-1)
    start = real.argmax(dim=1) if keys == real.shape[1] else torch.zeros_like(lengths)  # not 0 where padded on the left
    first, last = (
        place.long().view(-1, 1, 1, 1).expand(-1, heads, queries, 1)
        for place in (start, (start + lengths - 1).clamp(min=0))
    )
    return torch.stack(
        [
            mean(entropy) / lengths.clamp(min=2).log().view(-1, 1),
            mean(weights.amax(dim=-1)),
            mean(weights.gather(-1, first).squeeze(-1)),
            mean(weights.gather(-1, last).squeeze(-1)),
            *(mean(diagonal) for diagonal in _to_neighbours(weights)),
        ],
        dim=-1,
    )


def _to_neighbours(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each token gives itself, the one before and the one after, `[batch, heads, queries]` each.

    Zeros where queries and keys are not the same tokens.
    """
    if weights.shape[2] != weights.shape[3]:
        zero = torch.zeros_like(weights[..., 0])
        return zero, zero, zero
    pad = torch.nn.functional.pad
    previous, following = pad(weights.diagonal(-1, 2, 3), (1, 0)), pad(weights.diagonal(1, 2, 3), (0, 1))
    return weights.diagonal(0, 2, 3), previous, following
