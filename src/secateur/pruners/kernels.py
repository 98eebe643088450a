"""Inner products between heads, or between texts, and what they say: moments, HSIC, cosines, what is unexplained."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-12
_BLOCKS = 4  # five eighths of a full product's work; with more, the products are too narrow to run fast


def second_moments(rows: Tensor) -> Tensor:
    """Return `rows.T @ rows`, `[width, width]`: what lies below the diagonal is copied from above, block by block."""
    width = rows.shape[1]
    step = -(-width // _BLOCKS)
    moments = rows.new_zeros(width, width)
    for start in range(0, width, step):
        end = start + step
        moments[start:end, start:] = rows[:, start:end].T @ rows[:, start:]
        moments[end:, start:end] = moments[start:end, end:].T
    return moments


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC of kernels `[…, texts, texts]` (Song et al. 2012, JMLR 13, eq. 5).

    The plain estimate grows as texts get fewer; this one does not. There must be 4 texts or more.
    """
    n = first.shape[-1]
    off = 1 - torch.eye(n, device=first.device)
    first, second = first * off, second * off
    rows = (first.sum(dim=-1) * second.sum(dim=-1)).sum(dim=-1)
    sums = first.sum(dim=(-2, -1)) * second.sum(dim=(-2, -1))
    trace = (first * second).sum(dim=(-2, -1))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def cosines(products: Tensor) -> Tensor:
    """Return cosines `[heads, heads]` in [-1, 1] for inner products `[heads, heads]`."""
    norms = products.diagonal().clamp(min=TINY).sqrt()
    return (products / norms / norms.unsqueeze(1)).clamp(-1, 1)


def unexplained(products: Tensor) -> Tensor:
    """Return log of the share of each head that is no combination of the others, from the inverse of their cosines.

    `products` are inner products `[heads, heads]`; the result `[heads]` lies in [-7, 0].
    """
    alike = cosines(products).double()
    ridge = alike + 1e-3 * torch.eye(len(alike), dtype=torch.float64, device=alike.device)
    return (-torch.linalg.inv(ridge).diagonal().clamp(min=1).log()).clamp(min=-7).float()
