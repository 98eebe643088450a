"""Which rows and columns of which weights belong to each head: found by gradients, without naming any model.

A head owns an index of a weight if the gradient of something that the head computed reaches the index and no other
head's does.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.sites.layout import NOBODY, Slice


class Ownership:
    """Asks which parameters of a model single heads use; `random` draws the directions of the gradients."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self.random = torch.Generator().manual_seed(0)
        self.names: dict[int, str] = {}

    def look_up_names(self) -> None:
        """Learn which parameter is called what, as of now: those of an offloaded model come and go."""
        self.names = {id(p): n for n, p in self.base.named_parameters()}

    def is_matrix(self, piece: Slice) -> bool:
        """Is it more than a bias that is divided?"""
        return self.base.get_parameter(piece.parameter).ndim > 1

    def slices(
        self, site: str, module: nn.Module, role: str, per_head: list[Tensor], leave_out: Collection[str] = ()
    ) -> list[Slice]:
        """Back-propagate from each head alone; an axis along which the heads reach different indices is theirs.

        `per_head` holds, for each head, something that it alone computed with parameters of `module`; parameters named
        in `leave_out` are not looked at. Raises `UnsupportedModelError` for an index that some heads share.
        """
        holders = {
            id(p): holder for holder in module.modules() for p in holder.parameters(recurse=False) if p.requires_grad
        }
        parameters = [
            p
            for p in module.parameters()
            if id(p) in holders and id(p) in self.names and self.names[id(p)] not in leave_out
        ]
        if not parameters or not per_head[0].requires_grad:
            return []
        reached: dict[tuple[int, int], list[Tensor]] = {}
        for tensor in per_head:
            direction = torch.randn(tensor.shape, generator=self.random).to(tensor)
            gradients = torch.autograd.grad(tensor, parameters, direction, retain_graph=True, allow_unused=True)
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                for axis in range(parameter.ndim):
                    others = [a for a in range(parameter.ndim) if a != axis]
                    hit = (
                        torch.zeros(parameter.shape[axis], dtype=torch.bool)
                        if gradient is None
                        else ((gradient != 0).any(dim=others) if others else gradient != 0).cpu()
                    )
                    reached.setdefault((number, axis), []).append(hit)
        pieces = []
        for (number, axis), hits in reached.items():
            parameter = parameters[number]
            holder = holders[id(parameter)]
            owners = _owners(torch.stack(hits), _only_head_axis(holder, parameter, role) == axis)
            if owners == "mixed":
                raise UnsupportedModelError(
                    f"site {site}: an index of {self.names[id(parameter)]} is used by several heads but not by all"
                )
            if isinstance(owners, tuple):
                pieces.append(Slice(self.names[id(parameter)], axis, role, owners))
        return pieces


def _owners(hits: Tensor, is_only_axis: bool) -> tuple[int, ...] | str | None:
    """Turn `hits` [heads, indices] into an owner for each index; None = no head's own, "mixed" = cannot be told."""
    used = hits.any(dim=0)
    if not bool(used.any()):
        return None
    if len(hits) == 1:  # a single head reaches both axes of its matrix: only the layer's kind tells which is which
        if not is_only_axis:
            return None
    elif bool((hits == hits[0]).all()):
        return None
    elif bool((hits.sum(dim=0) > 1).any()):
        return "mixed"
    return tuple(torch.where(used, hits.int().argmax(dim=0), NOBODY).tolist())


def _only_head_axis(holder: nn.Module, parameter: nn.Parameter, role: str) -> int | None:
    """Return the axis that would be a lone head's: what a linear layer writes for q, k, v, what the output reads."""
    if not isinstance(holder, nn.Linear | Conv1D):
        return None
    if parameter.ndim == 1:
        return None if role == "output" else 0
    written = 1 if isinstance(holder, Conv1D) else 0
    return 1 - written if role == "output" else written
