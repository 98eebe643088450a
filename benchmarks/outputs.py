"""What a model says, how far two models are apart, and a mask to try: shared by the sweep and its battery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.base_model import base_of
from secateur.sites.layout import Site
from secateur.units.masks import Mask


def uneven_mask(sites: Mapping[str, Site]) -> Mask:
    """Drop units unevenly over the sites; grouped ones by their rule; a lone unit stays."""
    vectors = {}
    for number, (name, site) in enumerate(sites.items()):
        kept = torch.ones(site.num_units, dtype=torch.bool)
        if site.group_size > 1 and number % 2:
            kept[1 :: site.group_size] = False
        elif site.num_groups > 1:
            kept[: site.group_size] = False
            if site.group_size == 1 and number % 2 and site.num_units > 3:
                kept[2] = False
        elif site.num_units > 1:
            kept[0] = False
        vectors[name] = kept
    return Mask(vectors)


@torch.no_grad()
def said(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a model in evaluation mode says, with the same random numbers each time."""
    before = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return tensors(base_of(model)(**inputs))
    finally:
        torch.set_rng_state(before)


def tensors(value: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output, in order, but for maps, which lose an entry a head."""
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = [item for name, item in value.items() if "attention" not in name]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value where that is above 1; other shapes are infinite."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = float((a - b).abs().max() / a.abs().max().clamp(min=1))
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def tensors_only(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def shapes(inputs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in tensors_only(inputs).items())
