"""Is one model's output the other's? The comparison behind every removal and behind `secateur verify`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.base_model import base_of
from secateur.models.finite import tensors_of
from secateur.models.offload import device_of
from secateur.models.state import evaluation_mode, without_autocast

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
    devices = [base.device] if base.device.type == "cuda" else []
    with evaluation_mode(base), without_autocast(device_of(base)), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return tensors_of(base(**inputs))


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
