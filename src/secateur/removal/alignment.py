"""Whisper's word timestamps: heads that `generate` reads by their numbers, which change where others go.

`generation_config.alignment_heads` lists pairs of a decoder layer and a head of its attention to the encoder. No other
entry of a generation config of transformers counts heads.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import Tensor, nn

from secateur.units.masks import PresentMask

_ENTRY = "alignment_heads"
# What transformers calls a decoder layer's attention to the encoder in Whisper, and in the models it is made after.
_CROSS_ATTENTION = re.compile(r"(?:.*\.)?layers\.(\d+)\.encoder_attn")


def renumber_alignment_heads_(model: nn.Module, kept: PresentMask) -> None:
    """Give the alignment heads the numbers that they have once only the heads in `kept` are left.

    Pairs of heads that go are dropped. Where none is left, so is the entry: `generate` says then what it lacks.
    """
    settings: Any = getattr(model, "generation_config", None)
    pairs = getattr(settings, _ENTRY, None)
    if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
        return
    layers = {int(found[1]): vector for name, vector in kept.items() if (found := _CROSS_ATTENTION.fullmatch(name))}
    left = [[layer, _number(layers.get(layer), head)] for layer, head in pairs]
    settings = copy.deepcopy(settings)  # others may have the same object
    setattr(settings, _ENTRY, [pair for pair in left if pair[1] is not None])
    if not getattr(settings, _ENTRY):
        delattr(settings, _ENTRY)
    model.generation_config = settings


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(number, int) for number in value)


def _number(kept: Tensor | None, head: int) -> int | None:
    """Return the number of a head once others are gone; None where it goes too, or the site has no such head."""
    if kept is None:
        return head
    return int(kept[:head].sum()) if head < len(kept) and kept[head] else None
