"""Models whose weights accelerate keeps elsewhere (`device_map`: CPU memory, disk) and fetches layer by layer.

Between the calls of a layer its weights are on the meta device, where they have no values: whoever needs them borrows
them from the hooks that accelerate put on the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.support.interrupts import undoing


def is_offloaded(model: nn.Module) -> bool:
    """Return whether any weights are fetched from CPU memory or disk when their layer runs."""
    return any(has_offloaded_params(module) for module in model.modules())


def is_too_large_to_widen(model: nn.Module) -> bool:
    """Return whether there may be no room for all weights in float32: fetched ones, or halves spread over devices."""
    spread = any(hasattr(module, "_hf_hook") for module in model.modules())
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    return is_offloaded(model) or (spread and half)


def check_loaded(model: nn.Module, what: str) -> None:
    """Raise `UnsupportedModelError`, which says what works instead, where weights are kept elsewhere."""
    if is_offloaded(model):
        raise UnsupportedModelError(
            f"{what} needs all weights in memory, and `device_map` left some on CPU or disk; such a model can be "
            "scored, selected and gated: save its scores or mask, then load the model without `device_map` where it "
            "fits (`dtype=torch.bfloat16` halves it) and give the mask to `remove_`"
        )


def device_of(base: PreTrainedModel) -> torch.device:
    """Return the device on which the model takes its inputs: not where weights lie that are fetched when needed."""
    if base.device.type != "meta":
        return base.device
    devices = (getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in base.modules())
    found = next((device for device in devices if device is not None), base.device)
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


def weight_of(base: PreTrainedModel, parameter: str) -> Tensor:
    """Return the values of the parameter with that path, fetched to the CPU where they are kept elsewhere."""
    module, _, name = parameter.rpartition(".")
    owner = base.get_submodule(module)
    with align_module_device(owner, "cpu" if has_offloaded_params(owner) else None):
        return owner.get_parameter(name).detach()


@undoing
def fetched(block: nn.Module) -> Iterator[None]:
    """Keep the weights of `block` and of all in it where they run, the same objects from call to call."""
    with ExitStack() as stack:
        modules = [module for module in block.modules() if has_offloaded_params(module)]
        for module in modules:
            stack.enter_context(align_module_device(module))
        calls = [(module, module.forward) for module in modules]
        try:
            for module in modules:
                vars(module)["forward"] = vars(module)["_old_forward"]  # accelerate's would fetch the weights anew
            yield
        finally:
            for module, call in calls:
                vars(module)["forward"] = call


@undoing
def gradients_within(base: PreTrainedModel, blocks: dict[str, nn.Module]) -> Iterator[None]:
    """Let gradients flow inside each block alone, while its weights are fetched: one block's are held at a time."""
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks.values():
            inside = ExitStack()

            def enter(module: nn.Module, _: object, inside: ExitStack = inside) -> None:
                inside.enter_context(fetched(module))
                inside.enter_context(torch.enable_grad())

            def leave(*_: object, inside: ExitStack = inside) -> None:
                inside.close()

            hooks.callback(inside.close)
            hooks.callback(block.register_forward_pre_hook(enter, prepend=True).remove)
            hooks.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield
