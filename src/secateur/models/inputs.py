"""Small made-up inputs that reach every attention site: for finding heads, for the proof, and for counting cost."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.offload import device_of
from secateur.models.state import evaluation_mode

LENGTH = 12
"""Tokens of an example text, where nothing else is asked for."""


@torch.inference_mode(False)  # inputs made in inference mode could not be differentiated through
def example_inputs(
    model: PreTrainedModel, batch: int = 2, length: int = LENGTH, padding: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Return keyword arguments for one forward pass of the base model, the same at every call with
    the same arguments.

    Text: `[batch, length]` token ids drawn at random, the last `padding` tokens of every second text masked out.
    Images: `[batch, channels, height, width]` noise. Speech: noise of the length the model wants.
    Raises `UnsupportedModelError` for a model that takes something else.
    """
    base = base_of(model)
    config = base.config.get_text_config() if base.main_input_name == "input_ids" else base.config
    accepted = inspect.signature(base.forward).parameters
    random = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    name = base.main_input_name
    if name not in accepted:  # left at its default by some vision models
        name = "pixel_values" if "pixel_values" in accepted else name
    if name == "input_ids":
        inputs["input_ids"] = _token_ids(config, batch, length, random)
        if "attention_mask" in accepted:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[1::2, length - padding :] = 0
            inputs["attention_mask"] = mask
        if "bbox" in accepted:
            inputs["bbox"] = torch.zeros(batch, length, 4, dtype=torch.long)
        if "pixel_values" in accepted and _needs_both(base.config):
            inputs["pixel_values"] = _images(base.config.vision_config, batch, random)
    elif name == "pixel_values":
        inputs["pixel_values"] = _images(base.config, batch, random)
    elif name == "input_values":
        inputs["input_values"] = torch.randn(batch, 8000, generator=random)
    elif name == "input_features":
        inputs["input_features"] = _features(config, batch, random)
    else:
        raise UnsupportedModelError(
            f"{type(base).__name__} takes `{name}`, for which no example can be made; pass `inputs`"
        )
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(config, batch, length, random)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    device = device_of(base)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def forward_arguments(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Return each batch as the base model takes it: see `ForwardArguments`."""
    return list(ForwardArguments(model, batches))


class ForwardArguments(Sequence[dict[str, Any]]):
    """Batches as the base model takes them, made as they are asked for.

    What it does not take is left out, and caches are off: nothing here generates. A decoder beside an encoder that does
    not make its inputs by itself, as BART's does, gets the text too, one place later behind its start token, as when it
    is taught to repeat it, unless the batch has some.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = batches
        base = base_of(model)
        self.accepted = inspect.signature(base.forward).parameters
        reads = base.main_input_name == "input_ids" and "decoder_input_ids" in self.accepted
        self.start = _start_of_decoder(base) if reads else None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        """Return the arguments for the batch of that number."""
        return self.of(self.batches[number])

    def of(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments for a batch."""
        taken: dict[str, Any] = {k: v for k, v in batch.items() if k in self.accepted}
        if "use_cache" in self.accepted:
            taken["use_cache"] = False
        reads_texts = "input_ids" in taken and "decoder_input_ids" in self.accepted
        if reads_texts and self.start is not None and not any(name.startswith("decoder_") for name in taken):
            ids = taken["input_ids"]
            taken["decoder_input_ids"] = torch.cat([ids.new_full((len(ids), 1), self.start), ids[:, :-1]], dim=1)
        return taken


_starts: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _start_of_decoder(base: PreTrainedModel) -> int | None:
    """Return the token that a decoder must be given to start with, or None where it makes its inputs by itself.

    Which of the two it is shows in a small pass without any.
    """
    if base not in _starts:
        inputs = {name: x for name, x in example_inputs(base).items() if name != "decoder_input_ids"}
        configs = (base.config, base.config.get_text_config())
        names = ("decoder_start_token_id", "pad_token_id")
        tokens = [getattr(config, name, None) for name in names for config in configs]
        start = next((token for token in tokens if isinstance(token, int)), None)
        try:
            with torch.no_grad(), evaluation_mode(base):
                base(**inputs)
            start = None
        except (ValueError, AttributeError, TypeError):  # each kind has its own way to miss them
            pass
        _starts[base] = start
    return _starts[base]


def _needs_both(config: Any) -> bool:
    """Is this CLIP or its kin, which embeds a picture beside a text, rather than a text with pictures in it?"""
    places = ("image_token_id", "image_token_index")
    return hasattr(config, "vision_config") and not any(isinstance(getattr(config, p, None), int) for p in places)


def _images(config: Any, batch: int, random: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    frames = getattr(config, "num_frames", None)
    shape = [batch, *([frames] if isinstance(frames, int) else []), getattr(config, "num_channels", 3), height, width]
    return torch.randn(shape, generator=random)


def _features(config: Any, batch: int, random: torch.Generator) -> Tensor:
    """Make a spectrogram: bands × frames for Whisper and its kin, frames × bands for everything else."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size")
    bands = next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), 80)
    positions = getattr(config, "max_source_positions", None)
    if isinstance(positions, int) and not hasattr(config, "input_feat_per_channel"):
        return torch.randn(batch, bands, 2 * positions, generator=random)
    return torch.randn(batch, 64, bands, generator=random)


def _token_ids(config: Any, batch: int, length: int, random: torch.Generator) -> Tensor:
    """Draw token ids that avoid the special ones: RoBERTa, for one, derives positions from the padding id."""
    vocabulary = config.vocab_size if hasattr(config, "vocab_size") else 1000  # CANINE reads any character
    ids = torch.randint(0, vocabulary, (batch, length), generator=random)
    special = set()
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, key, None)
        special |= set(value) if isinstance(value, list | tuple) else {value}
    plain = next(i for i in range(vocabulary) if i not in special)
    for token in special - {None}:
        ids[ids == token] = plain
    return ids


def max_length(model: nn.Module, default: int = 512) -> int:
    """Return how many tokens the model has positions for, or `default` where its config does not say."""
    base = base_of(model)
    config = base.config.get_text_config() if base.main_input_name == "input_ids" else base.config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        # Of Whisper and its kin, whose encoders read no tokens, the decoder counts.
        decoder = base.config.get_text_config(decoder=True)
        found = [getattr(config, "max_target_positions", None), getattr(decoder, "max_position_embeddings", None)]
        return next((number for number in found if isinstance(number, int) and number > 0), default)
    for name, module in base.named_modules():
        weight, padding = getattr(module, "weight", None), getattr(module, "padding_idx", None)
        is_table = "position" in name and isinstance(weight, Tensor) and weight.shape[:1] == (positions,)
        if is_table and padding is not None:
            # RoBERTa and its kin start counting after the padding id. OPT and its kin do so too, in a longer table.
            return positions - (padding + 1)
    return positions
