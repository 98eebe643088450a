"""Gates on neurons and layers, by plain hooks: what `probe` is for heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.sites.feed_forward import channel_axis, is_projection
from secateur.sites.layers import stream_into, stream_out_of
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread


def takes_plain_gates(module: nn.Module) -> bool:
    """Is this what names a site of neurons or of layers, which hooks can gate?"""
    return isinstance(module, nn.ModuleList) or is_projection(module)


@undoing
def unit_gates(base: PreTrainedModel, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context neurons are multiplied by their gates, and layers are left out as far as theirs say.

    `gates` maps a site's name to factors for the units that are there now, `[units]`, or `[batch, units]` for a gate of
    its own for each text. A layer with the gate g turns the stream x into x + g · (layer(x) − x), so that 0 leaves it
    out; it runs all the same, since others may ask for what it stores.
    """
    with ExitStack() as hooks:
        for name, gate in gates.items():
            module = base.get_submodule(name)
            if isinstance(module, nn.ModuleList):
                for number, layer in enumerate(module):
                    handle = layer.register_forward_hook(in_own_thread(_blend(gate[..., number])), with_kwargs=True)
                    hooks.callback(handle.remove)
            else:
                hook = in_own_thread(_multiply(name, gate, channel_axis(module)))
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _multiply(name: str, gate: Tensor, axis: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        taken = args[0] if args else next(iter(kwargs.values()))
        shape = [1] * taken.ndim
        shape[axis] = gate.shape[-1]
        if gate.ndim == 2:
            if len(gate) != len(taken):
                raise UnsupportedModelError(
                    f"site {name} reads {len(taken)} rows, so {len(gate)} gates, one for each input, do not fit"
                )
            shape[0] = len(gate)
        gated = taken * gate.to(taken).view(shape)
        return ((gated, *args[1:]), kwargs) if args else ((gated,), {})

    return hook


def _blend(gate: Tensor) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taken, written = stream_into(args, kwargs), stream_out_of(output)
        assert taken is not None  # the site was found by both
        assert written is not None
        factor = gate.to(taken)
        blended = taken + (factor.view(-1, *[1] * (taken.ndim - 1)) if factor.ndim else factor) * (written - taken)
        return (blended, *output[1:]) if isinstance(output, tuple | list) else blended

    return hook


@undoing
def reached(base: PreTrainedModel, names: Iterator[str] | list[str], found: set[str]) -> Iterator[None]:
    """Within this context the sites of neurons and layers among `names` that a pass runs are added to `found`."""

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: found.add(name)

    with ExitStack() as hooks:
        for name in names:
            module = base.get_submodule(name)
            for one in module if isinstance(module, nn.ModuleList) else [module]:
                hooks.callback(one.register_forward_pre_hook(in_own_thread(hook(name))).remove)
        yield
