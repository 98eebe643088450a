"""Is one model's output the other's? The comparison behind every removal and behind `secateur verify`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from secateur.models.base_model import base_of
from secateur.models.finite import tensors_of
from secateur.models.offload import device_of
from secateur.models.state import evaluation_mode, without_autocast

_PLAIN = {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}  # what can be told apart by token

TOLERANCE = 1e-4
"""Largest difference in float32 that a proof accepts, relative to the largest output where that is above 1."""


@torch.no_grad()
def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return every floating-point tensor that the base model returns for `inputs`, attention maps aside, dropout off.

    Maps have an axis of heads, and some models return them unasked (BridgeTower); what they do shows in the rest.
    Random numbers that the model draws all the same (VITS adds noise, ViT-MAE hides patches) are the same at every
    call; the caller's generators are left as they were, and its autocast is off meanwhile.
    """
    base = base_of(model)
    with _repeatable(base):
        return tensors_of(base(**inputs))


@torch.no_grad()
def cached_step(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor] | None:
    """Return what the base model says of all tokens but the first, which it has read before and cached.

    A cache is told of its tokens layer by layer, so that a model may be right without one and wrong with it. None where
    the model keeps no cache for `inputs`, which one token shows, or they hold more than token ids and their mask.
    """
    base = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if not {"past_key_values", "use_cache"} <= accepted.keys() or name not in inputs or not inputs.keys() <= _PLAIN:
        return None
    given, tokens = {**inputs, "use_cache": True}, inputs[name]
    start = {**given, name: tokens[:, :1]}
    if name == "input_ids" and isinstance(given.get("attention_mask"), Tensor):
        start["attention_mask"] = given["attention_mask"][:, :1]
    with _repeatable(base):
        cache = getattr(base(**start), "past_key_values", None)
        if not isinstance(cache, Cache) or tokens.shape[1] < 2:
            return None
        step = base(**{**given, name: tokens[:, 1:]}, past_key_values=cache)
    return tensors_of({key: value for key, value in step.items() if key != "past_key_values"})


@contextmanager
def _repeatable(base: PreTrainedModel) -> Iterator[None]:
    """Within this context a pass computes the same every time: no dropout, no autocast, the same random numbers."""
    with evaluation_mode(base), without_autocast(device_of(base)):
        torch.manual_seed(0)
        yield


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors, divided by the largest value where above 1.

    NaN and infinity anywhere, or other shapes, count as an infinite difference.
    """
    if [t.shape for t in one] != [t.shape for t in other] or not one:
        return math.inf
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        scale = max(1.0, float(a.double().abs().max()) if a.numel() else 1.0)
        if not math.isfinite(difference) or not math.isfinite(scale):
            return math.inf
        worst = max(worst, difference / scale)
    return worst
