"""Weights narrowed to the units that stay, in place and so that it can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.sites.layout import Site

Undo = list[Callable[[], None]]


def narrow_(base: PreTrainedModel, site: Site, kept: Tensor, undo: Undo) -> None:
    """Narrow the weights of one site to the units in `kept` (bool `[units]`), and what layers of torch say of them.

    Works on meta weights too; those that accelerate fetches when they run are cut on the way from then on. `undo`
    collects what puts them back, in order.
    """
    for (name, axis), indices in site.kept_indices(kept).items():
        for attribute, tensor in cut_together(base, name).items():
            module: Any = base.get_submodule(name.rpartition(".")[0])
            if is_fetched(module, tensor):
                _cut_fetched_(module, attribute, axis, indices, undo)
                continue
            undo.append(_setter(tensor, tensor.data, tensor.grad))
            tensor.grad = None
            narrowed = tensor.data.index_select(axis, indices.to(tensor.device))
            # The Parameter stays the same object, so that a tied copy follows and an optimiser built before fails
            # loudly instead of training weights that are no longer part of the model.
            _set_data(tensor, narrowed)
        holder = base.get_submodule(name.rpartition(".")[0])
        for attribute, size in _sizes(holder).items():
            set_attribute_(holder, attribute, size, undo)


def cut_together(base: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Return the parameter with that path, and what a batch normalisation of that weight keeps of each channel.

    By their names in the module.
    """
    path, _, last = name.rpartition(".")
    holder = base.get_submodule(path)
    statistics = holder.named_buffers(recurse=False) if isinstance(holder, _BatchNorm) and last == "weight" else ()
    return {last: base.get_parameter(name), **{key: buffer for key, buffer in statistics if buffer.ndim == 1}}


class CutOnTheWay(Mapping[str, Tensor]):
    """Weights that are kept elsewhere, one of them without some of its indices. What is kept there stays whole."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, axis: int, indices: Tensor) -> None:
        self.weights, self.name, self.axis, self.indices = weights, name, axis, indices

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        return weight.index_select(self.axis, self.indices.to(weight.device)) if name == self.name else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def is_fetched(module: nn.Module, tensor: Tensor) -> bool:
    """Is this tensor of the module kept elsewhere by a hook of accelerate's, until the module runs?"""
    return tensor.is_meta and getattr(vars(module).get("_hf_hook"), "weights_map", None) is not None


def _cut_fetched_(module: nn.Module, name: str, axis: int, indices: Tensor, undo: Undo) -> None:
    """Let a tensor that is fetched come with these indices along an axis alone; what stands in for it is as small."""
    hook: Any = vars(module)["_hf_hook"]
    before, whole = hook.weights_map, getattr(module, name).shape

    def put_back() -> None:
        hook.weights_map = before
        stand_in = getattr(module, name)  # another object after every pass
        stand_in.data = stand_in.data.new_empty(whole)

    undo.append(put_back)
    hook.weights_map = CutOnTheWay(before, name, axis, indices)
    stand_in = getattr(module, name)
    stand_in.data = stand_in.data.index_select(axis, indices.to("meta"))


def set_attribute_(module: nn.Module, name: str, value: object, undo: Undo) -> None:
    """Set an attribute of a module; `undo` collects what puts the old value back."""
    old = getattr(module, name)
    undo.append(lambda: setattr(module, name, old))
    setattr(module, name, value)


def _sizes(holder: nn.Module) -> dict[str, int]:
    """Return the attributes with which a layer of torch or transformers tells the shape that its weight has now."""
    if isinstance(holder, nn.Linear):
        return {"out_features": holder.weight.shape[0], "in_features": holder.weight.shape[1]}
    if isinstance(holder, Conv1D):
        return {"nx": holder.weight.shape[0], "nf": holder.weight.shape[1]}
    if isinstance(holder, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # A filter for each head (Nyströmformer): where channels are kept apart, groups go with them.
        groups = max(1, holder.groups * holder.weight.shape[0] // holder.out_channels)
        written, read = holder.weight.shape[:2]
        return {"groups": groups, "out_channels": written, "in_channels": groups * read}
    if isinstance(holder, _BatchNorm):
        return {"num_features": len(holder.weight)}
    return {}


def _setter(parameter: Tensor, data: Tensor, grad: Tensor | None) -> Callable[[], None]:
    def put_back() -> None:
        parameter.grad = None
        _set_data(parameter, data)
        parameter.grad = grad

    return put_back


def _set_data(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter values of another shape, also while an output that was computed with the old ones lives on.

    Such an output keeps the node that collects the parameter's gradients, which the next pass would take over together
    with the old shape. Only a change of dtype makes torch part with it.
    """
    other = torch.bfloat16 if data.dtype == torch.float16 else torch.float16
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
