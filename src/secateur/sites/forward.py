"""What the forward pass of an attention module takes, and what it reads from its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

BIASES = ("position_bias", "alibi")


def own_forward(module: Any) -> Callable[..., Any]:
    """Return the forward function of the module's original class, whatever has been mixed into it since."""
    for parent in type(module).__mro__:
        if "forward" in vars(parent) and not hasattr(parent, "secateur_mixin"):
            return vars(parent)["forward"]
    return type(module).forward


def takes_bias(module: nn.Module) -> bool:
    """Is the module given a bias for every head by the layer or model around it?"""
    return any(name in inspect.signature(own_forward(module)).parameters for name in BIASES)


def reads_config(module: nn.Module, name: str) -> bool:
    """Does the module's forward pass take the setting `name` from the config, rather than from itself?"""
    if hasattr(module, name) or not hasattr(module, "config"):
        return False
    used = getattr(getattr(inspect.unwrap(own_forward(module)), "__code__", None), "co_names", ())
    return "config" in used and name in used


def is_emptied(module: nn.Module) -> bool:
    """Has a removal left this attention module without heads, so that its own code no longer runs?"""
    return hasattr(type(module), "secateur_emptied")
