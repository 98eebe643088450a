"""Attention code that counts on every layer having as many heads: what it is given is narrowed on the way in.

Two cases. T5, MPNet, Bloom and their kin hand one bias, with an entry for each head, to all layers: each narrowed
module picks its own heads from it, and passes the whole on where it passes it on. Phi-3 asks the config for the number
of heads in the middle of a forward pass: a narrowed module sees the config through a view with numbers of its own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.sites.forward import BIASES, own_forward
from secateur.sites.layout import Site

_MASK = "attention_mask"  # Falcon adds its bias to the mask before it hands both out
_PARTS = "secateur_parts"  # on a class that `mix_in_` made: what was mixed in, and into what
Undo = list[Callable[[], None]]
_running = threading.local()
"""`bias` holds, of the `NarrowedTable` that runs in this thread, the whole bias and its part: a module is shared."""


class Mixin:
    """What is mixed into the class of an attention module: see `mix_in_`."""

    secateur_mixin = True  # see `own_forward`

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the classes that the module's was made of, since pickle finds only the original under its name."""
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)  # of an instance; a name is of something global
        mixins: list[type] = []
        own: type = type(self)
        while (parts := vars(own).get(_PARTS)) is not None:
            mixins.insert(0, parts[0])
            own = parts[1]
        # What builds an instance comes first, its state follows.
        return (_rebuilt, (own, *mixins), *reduced[2:]) if mixins else reduced


@functools.cache
def _mixed(parts: tuple[type, type]) -> Any:
    """Return the class of a mixin and a module's class, under the latter's name: the same for all modules of a kind."""
    own = parts[1]
    return type(own.__name__, parts, {"__module__": own.__module__, _PARTS: parts})


def mix_in_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Let the methods of `mixin` go before those of the module's class.

    The class changes, not the instance's `forward`: a deep copy must not call back into the original.
    """
    module.__class__ = _mixed((mixin, type(module)))


def _rebuilt(own: type, *mixins: type) -> Any:
    """Return a module of class `own` with what was mixed in, without its state: where unpickling and copying start."""
    made: Any = own
    for mixin in mixins:
        made = _mixed((mixin, made))
    return made.__new__(made)


class NarrowedBias(Mixin):
    """Mixed into an attention module's class: of a bias for all original heads, only the kept heads' entries arrive."""

    secateur_heads: tuple[int, ...]
    secateur_total: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Narrow the bias, and a mask that has one in it, and run the module's own code."""
        own: Any = super()
        bound = inspect.signature(own.forward).bind(*args, **kwargs)
        mask = bound.arguments.get(_MASK)
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == self.secateur_total > 1:
            bound.arguments[_MASK] = self._narrow(mask)
        for name in BIASES:
            bias = bound.arguments.get(name)
            if isinstance(bias, Tensor):
                bound.arguments[name] = self._narrow(bias)
        return own.forward(*bound.args, **bound.kwargs)

    def _narrow(self, bias: Tensor) -> Tensor:
        heads = list(self.secateur_heads)
        if bias.ndim == 4:  # [1 or batch, heads, queries, keys]
            return bias[:, heads]
        by_head = bias.view(-1, self.secateur_total, *bias.shape[1:])  # [batch · heads, queries, keys]
        return by_head[:, heads].flatten(0, 1)


class NarrowedTable(NarrowedBias):
    """For T5 and its kin: a module computes the bias where it is given none, and returns it for the layers that follow.

    What it computes, or was given, is returned whole.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run narrowed, and return the bias whole."""
        outer = getattr(_running, "bias", None)  # of a pass that a hook of the user's interrupts with this one
        _running.bias = (None, None)
        try:
            outputs = super().forward(*args, **kwargs)
            whole, part = _running.bias
        finally:
            _running.bias = outer
        made = outputs[1]
        if whole is None:  # neither given nor computed from a table, as in cross-attention: the same for every head
            shape = (made.shape[0], self.secateur_total, *made.shape[2:])
            whole = made[:, :1].expand(shape) if made.shape[1] else made.new_zeros(shape)
        elif made is not part:  # before transformers 5.18 the bias that is passed on has the mask in it
            mask = inspect.signature(own_forward(self)).bind(self, *args, **kwargs).arguments.get("mask")
            whole = whole[:, :, -made.shape[2] :]
            whole = whole if mask is None else whole + mask[..., : whole.shape[-1]]
        return (outputs[0], whole, *outputs[2:])

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the bias of all original heads, and return this module's part."""
        own: Any = super()
        return self._narrow(own.compute_bias(*args, **kwargs))

    def _narrow(self, bias: Tensor) -> Tensor:
        part = super()._narrow(bias)
        _running.bias = (bias, part)
        return part


def narrow_bias_(module: nn.Module, site: Site, heads: tuple[int, ...], undo: Undo) -> None:
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
        mix_in_(module, NarrowedTable if hasattr(before, "compute_bias") else NarrowedBias)
    adapted: Any = module
    adapted.secateur_heads, adapted.secateur_total = heads, site.original_num_units


class ConfigView:
    """A config as one module sees it: `own` values of its own, everything else as `of` has it at the time."""

    def __init__(self, of: PreTrainedConfig, own: dict[str, int]) -> None:
        self.of, self.own = of, own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("of", "own"):
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.of, name)


def set_in_config_(base: PreTrainedModel, path: str, value: int, undo: Undo) -> None:
    """Change one setting for one module: `path` is "<module>.config.<setting>"."""
    holder, _, name = path.rpartition(".")
    module: Any = base.get_submodule(holder.removesuffix(".config"))
    before = module.config
    undo.append(lambda: setattr(module, "config", before))
    of, own = (before.of, before.own) if isinstance(before, ConfigView) else (before, {})
    module.config = ConfigView(of, {**own, name: value})
