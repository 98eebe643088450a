"""Twins of a model on the meta device, built from its config with other numbers: what a config alone can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.models.loading import quiet_transformers
from secateur.sites.narrowing import Undo

PLAIN = (bool, int, float, str, type(None))
"""Types of the attributes by which modules count."""

Place = tuple[str, ...]
"""Where a value is in nested dictionaries."""


def twin_of(model: PreTrainedModel, data: dict[str, Any]) -> PreTrainedModel | None:
    """Build the model's class on the meta device from a config's data; None where that fails."""
    try:
        with quiet_transformers(progress=True):  # it logs what numbers do not suit it
            config = type(model.config).from_dict(data)
            for name, value in vars(model.config).items():
                if name.startswith("_") and isinstance(value, PLAIN):
                    vars(config)[name] = value  # how attention is computed is in no file
            with torch.random.fork_rng([]), torch.device("meta"):
                return type(model)(config)
    except Exception:  # whatever a class or a config raises over numbers that do not suit it
        return None


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of everything that a checkpoint of the model holds, by its name."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def walk(data: Mapping[str, Any], above: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the value of everything in nested dictionaries that is none itself."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from walk(value, (*above, key))
        else:
            yield (*above, key), value


def changed_data(data: Mapping[str, Any], changes: Mapping[Place, Any], above: Place = ()) -> dict[str, Any]:
    """Return nested dictionaries with other values at these places."""
    found = {}
    for key, value in data.items():
        place = (*above, key)
        found[key] = changed_data(value, changes, place) if isinstance(value, dict) else changes.get(place, value)
    return found


def is_plain(value: Any) -> bool:
    """Is it a number, a text or the like, or a list of such, which is compared by what it says?"""
    return isinstance(value, PLAIN) or (isinstance(value, list | tuple) and all(map(is_plain, value)))


def take_over_(model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel, undo: Undo) -> None:
    """Give every module the config of the twin `after`, and the attributes in which that differs from `before`."""
    for path, new in after.named_modules():
        module, old = model.get_submodule(path), before.get_submodule(path)
        for name, value in vars(new).items():
            was = vars(module).get(name)
            counted = is_plain(value) and value != vars(old).get(name, value) and was == vars(old).get(name)
            if counted or isinstance(value, PreTrainedConfig):
                undo.append(partial(setattr, module, name, was))
                setattr(module, name, value)
