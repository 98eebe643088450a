"""Weights that accelerate fetches when their layer runs: read, replaced, widened, and held while gradients flow.

Whoever needs their values borrows them from the hooks that accelerate put on the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params, recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.models.offload import HALVES, own_tensors
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread


def weight_of(base: PreTrainedModel, parameter: str) -> Tensor:
    """Return the values of the parameter with that path, fetched to the CPU where they are kept elsewhere."""
    module, _, name = parameter.rpartition(".")
    return values_of(base.get_submodule(module), name)


def values_of(module: nn.Module, name: str) -> Tensor:
    """Return the values of a parameter of this module, fetched to the CPU where they are kept elsewhere."""
    with align_module_device(module, "cpu" if has_offloaded_params(module) else None):
        return module.get_parameter(name).detach()


def set_values_(module: nn.Module, values: Mapping[str, Tensor]) -> Callable[[], None]:
    """Give parameters of this module other values. Return what puts those back that were there.

    Where parameters are kept elsewhere, those there stay as they are, and these are fetched in their place.
    """
    if has_offloaded_params(module):
        hook: Any = vars(module)["_hf_hook"]
        put_back = partial(setattr, hook, "weights_map", hook.weights_map)
        hook.weights_map = Replaced(hook.weights_map, values)
        return put_back
    before = {name: module.get_parameter(name).data for name in values}
    _set_resident(module, values)
    return partial(_set_resident, module, before)


def _set_resident(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module.get_parameter(name).data = value


class Replaced(Mapping[str, Tensor]):
    """Weights that are kept elsewhere, but for some that have other values."""

    def __init__(self, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self.weights, self.replaced = weights, values

    def __getitem__(self, name: str) -> Tensor:
        return self.replaced[name] if name in self.replaced else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@undoing
def fetched(block: nn.Module) -> Iterator[None]:
    """Keep the weights of `block` and of all in it where they run, the same objects from call to call."""
    with ExitStack() as stack:
        modules = [module for module in block.modules() if has_offloaded_params(module)]
        for module in modules:
            stack.enter_context(align_module_device(module))
        hooks = [vars(module)["_hf_hook"] for module in modules]
        try:
            for hook in hooks:
                hook.offload = False  # or each call would fetch the weights anew
            yield
        finally:
            for hook in hooks:
                hook.offload = True


def put_away_(model: nn.Module) -> None:
    """Let go of weights that were fetched for a pass which was broken off."""
    for module in model.modules():
        own = module.parameters(recurse=False)
        if has_offloaded_params(module) and not all(parameter.is_meta for parameter in own):
            vars(module)["_hf_hook"].post_forward(module, None)


@undoing
def gradients_within(base: PreTrainedModel, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let gradients flow inside each block alone, while its weights are fetched: one block's are held at a time."""
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks:
            inside = ExitStack()

            def enter(
                module: nn.Module, args: Any, kwargs: dict[str, Any], inside: ExitStack = inside
            ) -> tuple[Any, dict[str, Any]]:
                inside.enter_context(fetched(module))
                inside.enter_context(torch.enable_grad())
                # Else the graph of a block that wrote this would be held together with its weights.
                return recursively_apply(torch.Tensor.detach, args), recursively_apply(torch.Tensor.detach, kwargs)

            def leave(*_: object, inside: ExitStack = inside) -> None:
                inside.close()

            hooks.callback(inside.close)
            hooks.callback(block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the model's lists, those of lists within a layer left out."""
    return [
        layer
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in path.split("."))
        for layer in module
    ]


@undoing
def in_float32_where_it_runs(model: nn.Module) -> Iterator[None]:
    """Let half-precision weights be float32 meanwhile, but only while they run: fetched ones, and others by blocks.

    accelerate gives a weight the dtype of what stands in for it.
    """
    stand_ins = [
        (module, name, tensor.dtype)
        for module in model.modules()
        for name, tensor in own_tensors(module).items()
        if tensor.is_meta and tensor.dtype in HALVES
    ]
    with ExitStack() as stack:
        for block in _blocks(model):
            stack.enter_context(_wide_while_it_runs(block))
        try:
            for module, name, _ in stand_ins:
                getattr(module, name).data = getattr(module, name).data.float()
            yield
        finally:
            for module, name, dtype in stand_ins:
                getattr(module, name).data = getattr(module, name).data.to(dtype)


def _blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Return the modules of each layer, and each module outside of layers by itself."""
    layers = [list(layer.modules()) for layer in layers_of(model)]
    inside = {id(module) for block in layers for module in block}
    return [*layers, *([module] for module in model.modules() if id(module) not in inside)]


@undoing
def _wide_while_it_runs(block: list[nn.Module]) -> Iterator[None]:
    """Hold the half-precision weights of these modules in float32 while the first of them runs."""
    before: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def enter(*_: object) -> None:
        for module in block:
            for tensor in own_tensors(module).values():
                if tensor.dtype in HALVES and not tensor.is_meta:
                    before.append((tensor, tensor.data, tensor.grad))
                    tensor.grad = None  # of another dtype
                    tensor.data = tensor.data.float()

    def leave(*_: object) -> None:
        while before:
            tensor, data, gradient = before.pop()
            tensor.data = data
            tensor.grad = gradient

    hooks = [
        block[0].register_forward_pre_hook(in_own_thread(enter), prepend=True),
        block[0].register_forward_hook(in_own_thread(leave), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        leave()  # after Ctrl-C within a pass, of which torch runs no hooks
