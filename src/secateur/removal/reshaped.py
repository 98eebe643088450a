"""Attention code that takes the width of all its heads to be the width of what it is given (BLIP, PVT v2, TimeSformer).

Such code asks a reshape for the full width, or, as the width of one head, for the full width divided by the heads that
are left. Neither fits a narrowed tensor, so the request fails; here it is corrected on the way. A request that fits is
left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.removal.adapted import Mixin, mix_in_
from secateur.sites.layout import Site

_RESHAPES = (Tensor.view, Tensor.reshape, torch.reshape)


class _FittingShapes(TorchFunctionMode):
    """Corrects requests for shapes that take `full` to be the width of the `heads` that are left, `width` each."""

    def __init__(self, heads: int, width: int, full: int) -> None:
        super().__init__()
        self.heads, self.width, self.full = heads, width, full

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and not kwargs and isinstance(args[0], Tensor):
            asked = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
            if all(isinstance(size, int) for size in asked):
                return func(args[0], self.fit(tuple(asked), args[0].numel()))
        return func(*args, **kwargs)

    def fit(self, asked: tuple[int, ...], total: int) -> tuple[int, ...]:
        """Return `asked` with the widths of a narrowed module, where only so it has `total` elements."""
        if -1 in asked or math.prod(asked) == total:
            return asked
        better = [(place, self.heads * self.width) for place, size in enumerate(asked) if size == self.full]
        for place, (size, following) in enumerate(itertools.pairwise(asked), 1):
            if self.heads and size == self.heads and following == self.full // self.heads:
                better.append((place, self.width))
        better.sort(reverse=True)  # a batch or a length may be the same number; features come last
        for count in range(1, len(better) + 1):
            for changes in itertools.combinations(better, count):
                fitted = list(asked)
                for place, size in changes:
                    fitted[place] = size
                if math.prod(fitted) == total:
                    return tuple(fitted)
        return asked


class ReshapedAttention(Mixin):
    """Mixed into an attention module's class: its requests for shapes of the full width are corrected."""

    secateur_shape: tuple[int, int, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own code."""
        own: Any = super()
        with _FittingShapes(*self.secateur_shape):
            return own.forward(*args, **kwargs)


def reshape_(module: nn.Module, site: Site, heads: int, undo: list[Callable[[], None]] | None = None) -> None:
    """Let `module`, which has `heads` of the site's original heads left, run; `undo` collects what reverses that."""
    before, shape = type(module), vars(module).get("secateur_shape")

    def put_back() -> None:
        module.__class__ = before
        vars(module).pop("secateur_shape", None)
        if shape is not None:
            vars(module)["secateur_shape"] = shape

    if undo is not None:
        undo.append(put_back)
    if not issubclass(before, ReshapedAttention):
        mix_in_(module, ReshapedAttention)
    adapted: Any = module
    adapted.secateur_shape = (heads, site.width, site.original_num_units * site.width)
