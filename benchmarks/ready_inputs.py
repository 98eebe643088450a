"""Inputs for tiny models of which secateur makes no example: what a user would pass as `inputs`.

By the name of the input that a model takes first of all; there is no table of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.inputs import LENGTH, example_inputs

Draw = Callable[..., Tensor]


def ready_inputs(
    model: PreTrainedModel, batch: int = 2, length: int = LENGTH, padding: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Return what `example_inputs` does, and where that makes none, inputs by the table below."""
    base = base_of(model)
    if base.main_input_name not in _READY or has_examples(model):
        return example_inputs(model, batch, length, padding, seed)
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random)

    return _READY[base.main_input_name](base.config, draw, length)


def has_examples(model: PreTrainedModel) -> bool:
    """Does secateur make example inputs for the model, so that calls need not be given any?"""
    try:
        example_inputs(model)
    except UnsupportedModelError:
        return False
    return True


def _series(config: Any, draw: Draw, length: int) -> dict[str, Any]:
    channels = getattr(config, "num_input_channels", None)
    values = draw(config.context_length, *([] if channels is None else [channels]))
    if channels is not None:
        return {"past_values": values}
    zeros = torch.zeros(values.shape, dtype=torch.long)
    return {"past_values": values, "past_values_padding": zeros, "freq": zeros[:, :1]}


def _trajectory(config: Any, draw: Draw, length: int) -> dict[str, Any]:
    states = draw(length, config.state_dim)
    steps = torch.arange(length).expand(len(states), -1)
    return {
        "states": states,
        "actions": draw(length, config.act_dim),
        "returns_to_go": draw(length, 1),
        "timesteps": steps,
        "attention_mask": torch.ones_like(steps),
    }


def _video(config: Any, draw: Draw, length: int) -> dict[str, Any]:
    seen = getattr(config, "vision_config", config)
    size = (seen.image_size, seen.image_size) if isinstance(seen.image_size, int) else tuple(seen.image_size)
    videos = draw(seen.num_frames, seen.num_channels, *size)
    if not hasattr(config, "text_config"):
        return {"pixel_values_videos": videos}
    words = draw(length).abs().mul(8).long() + 3
    return {"pixel_values_videos": videos, "input_ids": words, "attention_mask": torch.ones_like(words)}


def _sound(config: Any, draw: Draw, length: int) -> dict[str, Any]:
    features = draw(64, config.input_feat_size)
    return {"audio_mel": features, "audio_mel_mask": torch.zeros(features.shape[:2], dtype=torch.bool)}


_READY: dict[str, Callable[[Any, Draw, int], dict[str, Any]]] = {
    "past_values": _series,
    "states": _trajectory,
    "pixel_values_videos": _video,
    "latents": lambda config, draw, length: {"latents": draw(config.hidden_size, length)},
    "inputs": lambda config, draw, length: {"inputs": draw(length, config.d_model)},
    "inputs_embeds": lambda config, draw, length: {"inputs_embeds": draw(length, config.hidden_size)},
    "audio_mel": _sound,
}
