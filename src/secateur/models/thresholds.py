"""Lengths of text from which a model computes otherwise, as far as its config has them: windows, chunks, distances."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.models.base_model import base_of
from secateur.models.inputs import LENGTH, example_inputs, max_length

LONGEST = 1024
"""Thresholds above this many tokens are not looked past: attention costs the square of the length."""

# What the names of settings that are lengths have in them. One too many costs a longer pass, and nothing else.
_LENGTHS = (
    "window", "chunk", "block", "bucket", "distance", "local", "radius", "relative", "segment", "span", "stride",
    "topk", "top_k", "original_max_position",
)  # fmt: skip


def long_example_inputs(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return example inputs, one text, that are longer than every threshold in the model's config up to `LONGEST`.

    A threshold is a whole number, also within a nested config or a list, whose name has a word for a length in it. None
    where the usual example inputs are longer than all of them, where the model has no positions for more, and where it
    reads no text.
    """
    base = base_of(model)
    if base.main_input_name != "input_ids":
        return None
    most = max_length(base, sys.maxsize)
    passed = [number for number in _thresholds(base.config) if LENGTH <= number <= LONGEST and number < most]
    return example_inputs(base, 1, min(max(passed) + LENGTH, most), padding=0) if passed else None


def _thresholds(settings: Any, name: str = "") -> Iterator[int]:
    """Yield each whole number in a config, a dict or a list, whose own or whose list's name has a length in it."""
    if isinstance(settings, PreTrainedConfig):
        settings = vars(settings)
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _thresholds(value, str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _thresholds(value, name)
    elif isinstance(settings, int) and not isinstance(settings, bool) and _names_a_length(name):
        yield settings


def _names_a_length(name: str) -> bool:
    # A pruned model's config also has paths of modules, with dots.
    return name.isidentifier() and any(word in name for word in _LENGTHS)
