"""Where in a model NaN or infinity arises: no score, mask or metric is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from secateur.errors import InvalidInputError
from secateur.models.state import hooked
from secateur.support.threads import in_own_thread


def check_finite(found: Tensor, model: nn.Module, again: Callable[[], Any]) -> None:
    """Raise `InvalidInputError`, naming the module where it began, unless all of `found` is finite.

    `again` runs the pass of `model` that `found` came from once more.
    """
    if not bool(torch.isfinite(found).all()):
        where = first_not_finite(model, again)
        raise _error("the model computes NaN or infinity" + (f", first in {where}" if where else ""))


def check_pass(model: nn.Module, run: Callable[[], Any]) -> None:
    """Raise `InvalidInputError`, naming the module where it began, unless all that `run` computes is finite."""
    if (where := first_not_finite(model, run)) is not None:
        raise _error(f"the model computes NaN or infinity, first in {where}")


@torch.no_grad()
def check_weights(model: nn.Module) -> None:
    """Raise `InvalidInputError`, naming the first, where weights are not finite."""
    for name, weight in model.named_parameters():
        packed = weight.is_meta or is_traceable_wrapper_subclass(weight)  # quantised ones cannot be asked
        if not packed and not bool(torch.isfinite(weight).all()):
            raise _error(f"{name} holds NaN or infinity")


def _error(what: str) -> InvalidInputError:
    return InvalidInputError(f"{what}; check the model's weights, or compute in float32 or bfloat16")


@torch.no_grad()
def first_not_finite(model: nn.Module, again: Callable[[], Any]) -> str | None:
    """Return the path of the first module whose output is not finite while `again` runs, innermost first, or None."""
    places: list[str] = []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not places and not all(bool(torch.isfinite(t).all()) for t in tensors_of(output)):
                places.append(name or type(model).__name__)

        return hook

    with hooked(module.register_forward_hook(in_own_thread(see(name))) for name, module in model.named_modules()):
        again()
    return places[0] if places else None


def tensors_of(value: Any) -> list[Tensor]:
    """Return every floating-point tensor in what a model returns, attention maps aside."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = [item for name, item in value.items() if not str(name).endswith("attentions")]
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]
