"""Models whose weights accelerate keeps elsewhere (`device_map`: CPU memory, disk) and fetches layer by layer.

Between the calls of a layer its weights are on the meta device, where they have no values: see `fetched.py`.
"""

from __future__ import annotations

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError

HALVES = (torch.float16, torch.bfloat16)
"""Dtypes of half precision."""


def is_offloaded(model: nn.Module) -> bool:
    """Return whether any weights are fetched from CPU memory or disk when their layer runs."""
    return any(has_offloaded_params(module) for module in model.modules())


def is_too_large_to_widen(model: nn.Module) -> bool:
    """Return whether there may be no room for all weights in float32: fetched ones, or halves spread over devices."""
    spread = any(hasattr(module, "_hf_hook") for module in model.modules())
    half = any(parameter.dtype in HALVES for parameter in model.parameters())
    return is_offloaded(model) or (spread and half)


def check_loaded(model: nn.Module, what: str) -> None:
    """Raise `UnsupportedModelError`, which says what works instead, where weights are kept elsewhere."""
    if is_offloaded(model):
        raise UnsupportedModelError(
            f"{what} needs all weights in memory, and `device_map` left some on CPU or disk; load the model without "
            "`device_map` where it fits (`dtype=torch.bfloat16` halves it), or prune it by its name or folder with the "
            'device "auto", which neither copies nor distils it'
        )


def check_reachable(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for weights without values that no hook of accelerate's on their module fetches."""
    for path, module in model.named_modules():
        for name, tensor in own_tensors(module).items():
            if tensor.is_meta and not has_offloaded_params(module):
                raise UnsupportedModelError(
                    f"{path}.{name} is on the meta device, and nothing fetches it when the model runs; load the model "
                    "with `from_pretrained` and `device_map`"
                )


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of the module itself, by name."""
    return dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


def device_of(base: PreTrainedModel) -> torch.device:
    """Return the device on which the model takes its inputs: not where weights lie that are fetched when needed."""
    if base.device.type != "meta":
        return base.device
    devices = (getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in base.modules())
    found = next((device for device in devices if device is not None), base.device)
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)
