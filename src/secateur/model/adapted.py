"""Attention code that counts on every layer having as many heads: what it is given is narrowed on the way in.

Two cases. T5, MPNet, Bloom and their kin hand one bias, with an entry for each head, to all layers: each narrowed
module picks its own heads from it, and passes the whole on where it passes it on. Phi-3 asks the config for the number
of heads in the middle of a forward pass: a narrowed module sees the config through a view with numbers of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.model.layout import AttentionSite

_BIASES = ("position_bias", "alibi")
_MASK = "attention_mask"  # Falcon adds its bias to the mask before it hands both out
Undo = list[Callable[[], None]]


class NarrowedBias:
    """Mixed into an attention module's class: of a bias for all original heads, only the kept heads' entries arrive."""

    secateur_heads: tuple[int, ...]
    secateur_total: int
    _whole: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Narrow the bias, run the module's own code, and return the bias whole where that code returns one."""
        own: Any = super()
        bound = inspect.signature(own.forward).bind(*args, **kwargs)
        self._whole = None
        for name in _BIASES:
            bias = bound.arguments.get(name)
            if isinstance(bias, Tensor):
                self._whole = bias
                bound.arguments[name] = self._narrow(bias)
        mask = bound.arguments.get(_MASK)
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == self.secateur_total > 1:
            bound.arguments[_MASK] = self._narrow(mask)
        outputs = own.forward(*bound.args, **bound.kwargs)
        whole, self._whole = self._whole, None
        if hasattr(self, "compute_bias"):  # T5 and its kin return the bias, second, for the layers that follow
            made = outputs[1]
            if whole is None:  # no table here, as in cross-attention: zeros
                whole = made.new_zeros(made.shape[0], self.secateur_total, *made.shape[2:])
            outputs = (outputs[0], whole, *outputs[2:])
        return outputs

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the bias of all original heads, which other layers may want, and return this module's part."""
        own: Any = super()
        whole = own.compute_bias(*args, **kwargs)
        self._whole = whole
        return self._narrow(whole)

    def _narrow(self, bias: Tensor) -> Tensor:
        heads = list(self.secateur_heads)
        if bias.ndim == 4:  # [1 or batch, heads, queries, keys]
            return bias[:, heads]
        by_head = bias.view(-1, self.secateur_total, *bias.shape[1:])  # [batch · heads, queries, keys]
        return by_head[:, heads].flatten(0, 1)


def takes_bias(module: nn.Module) -> bool:
    """Is the module given a bias for every head by the layer or model around it?"""
    own: Any = next(c for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, NarrowedBias))
    return any(name in inspect.signature(own.forward).parameters for name in _BIASES)


def narrow_bias_(module: nn.Module, site: AttentionSite, heads: tuple[int, ...], undo: Undo) -> None:
    """Let `module` pick the original `heads` from the biases that it is given; `undo` collects what reverses that."""
    before = type(module)
    state = {k: v for k, v in vars(module).items() if k.startswith("secateur_")}

    def put_back() -> None:
        module.__class__ = before
        for name in ("secateur_heads", "secateur_total"):
            vars(module).pop(name, None)
        vars(module).update(state)

    undo.append(put_back)
    if not issubclass(before, NarrowedBias):
        bases = (NarrowedBias, before) if hasattr(before, "compute_bias") else (_WithoutTable, before)
        # The class changes, not the instance's `forward`: a deep copy must not call back into the original.
        module.__class__ = type(before.__name__, bases, {"__module__": before.__module__})
    adapted: Any = module
    adapted.secateur_heads, adapted.secateur_total = heads, site.original_num_heads


class _WithoutTable(NarrowedBias):
    """For modules that are given their bias and never compute one."""

    compute_bias = property()  # raises AttributeError: `hasattr` says no


class ConfigView:
    """A config as one module sees it: `own` values of its own, everything else as `of` has it at the time."""

    def __init__(self, of: PreTrainedConfig, own: dict[str, int]) -> None:
        self.of, self.own = of, own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("of", "own"):
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.of, name)


def reads_config(module: nn.Module, name: str) -> bool:
    """Does the module's forward pass take the setting `name` from the config, rather than from itself?"""
    if hasattr(module, name) or not hasattr(module, "config"):
        return False
    used = getattr(getattr(inspect.unwrap(type(module).forward), "__code__", None), "co_names", ())
    return "config" in used and name in used


def set_in_config_(base: PreTrainedModel, path: str, value: int, undo: Undo) -> None:
    """Change one setting for one module: `path` is "<module>.config.<setting>"."""
    holder, _, name = path.rpartition(".")
    module: Any = base.get_submodule(holder.removesuffix(".config"))
    before = module.config
    undo.append(lambda: setattr(module, "config", before))
    of, own = (before.of, before.own) if isinstance(before, ConfigView) else (before, {})
    module.config = ConfigView(of, {**own, name: value})
