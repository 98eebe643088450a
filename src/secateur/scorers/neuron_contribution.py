"""How much a neuron writes: what the criterion `contribution` is for neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.fetched import weight_of
from secateur.models.state import hooked
from secateur.scorers.base import ScoringTask
from secateur.sites.feed_forward import FeedForwardSite, channel_axis, rows_of_tokens
from secateur.support.threads import in_own_thread
from secateur.texts.batches import Batch


@torch.no_grad()
def neuron_contributions(task: ScoringTask) -> dict[str, Tensor]:
    """Return, for each site, E[x²]·‖w‖² of every neuron: `[neurons]`, ≥ 0.

    x is what the last projection is given of the neuron, its mean square taken over all real tokens, and w the column
    that reads it: the squared norm of what the neuron adds to the residual stream. One dense pass; no more is held than
    a sum for each neuron.
    """
    sums = {name: _Squares(torch.zeros(site.num_units, dtype=torch.float64)) for name, site in task.sites.items()}

    def run(batch: Batch) -> dict[str, _Squares]:
        # Made before the pass: what stays between its large tensors would keep their memory from being used again.
        found = {name: _Squares(torch.zeros_like(one.total)) for name, one in sums.items()}
        modules = {name: task.model.get_submodule(name) for name in found}
        with hooked(
            module.register_forward_pre_hook(
                in_own_thread(_reader(found[name], channel_axis(module), batch.get("attention_mask"))), with_kwargs=True
            )
            for name, module in modules.items()
        ):
            task.model(**batch)
        return found

    for found in task.each(run):
        for name, squares in found.items():
            sums[name].total += squares.total
            sums[name].tokens += squares.tokens
    return {
        name: sums[name].total / max(sums[name].tokens, 1) * _norms(task, site) for name, site in task.sites.items()
    }


@dataclass
class _Squares:
    """Sums over tokens of each neuron's square, `[neurons]`."""

    total: Tensor
    tokens: int = 0


def _reader(squares: _Squares, axis: int, mask: Tensor | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of_tokens(args[0] if args else next(iter(kwargs.values())), axis, mask)
        squares.total += rows.float().square().sum(dim=0).double().cpu()
        squares.tokens += len(rows)

    return hook


def _norms(task: ScoringTask, site: FeedForwardSite) -> Tensor:
    """Return the squared norm of the column that reads each neuron, `[neurons]`."""
    norms = torch.zeros(site.num_units, dtype=torch.float64)
    for piece in site.slices_of("output"):
        weight = weight_of(task.model, piece.parameter).double().cpu()
        squares = weight.square().sum(dim=[axis for axis in range(weight.ndim) if axis != piece.axis])
        norms.index_add_(0, torch.tensor(piece.owners), squares)
    return norms
