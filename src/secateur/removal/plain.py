"""Cut models that a config alone describes: their folders have no recipe, and load where secateur is not.

So it is where every layer keeps as many neurons, and as many heads where the config says the size of a head, and where
whole layers went. Which numbers of the config say so is found by trying: the model is built on the meta device with
other numbers in the place of the old ones, and one that has every shape of the cut model, and its counts, describes it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.removal.left import Left
from secateur.removal.proving import Special
from secateur.removal.replay import cut_site_
from secateur.removal.telling import recipe_of
from secateur.removal.twins import PLAIN, Place, changed_data, shapes_of, take_over_, twin_of, walk
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.sites.narrowing import Undo
from secateur.sites.recipe import KEY, PLAIN_KEY, Recipe
from secateur.units.masks import Mask

_MOST_TRIES = 64
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Counts = dict[int, set[int]]
"""What an old number of units may have become."""


def say_plainly_(model: PreTrainedModel, recipe: Recipe, undo: Undo) -> bool:
    """Give the cut `model` a config that describes it without `recipe`; return whether there is one.

    Weights stay as they are. `undo` collects what puts the old config back. Nothing is proved here: see `remove_`.
    """
    counts = _counts(recipe)
    if counts is None or recipe.bypassed or recipe.reshaped:
        return False
    data = {key: value for key, value in model.config.to_dict().items() if key not in (KEY, PLAIN_KEY)}
    before: PreTrainedModel | None = None
    for tried in itertools.islice(_configs(data, counts), _MOST_TRIES):
        after = twin_of(model, tried)
        if after is not None and _has_shapes_of(model, after):
            before = before or twin_of(model, data)
            if before is None:
                return False
            if _floats_of(after) != _floats_of(before):
                continue
            take_over_(model, before, after, undo)
            return _is_alike(model, before, after, recipe)
    return False


def can_be_plain(model: PreTrainedModel, sites: Mapping[str, Site], mask: Mask) -> bool:
    """Is there a config for `model` without the units that `mask` drops? Its twin is cut, on the meta device.

    Nothing is computed, so `remove_` may still find that the config means another model.
    """
    twin = twin_of(model, model.config.to_dict())
    if twin is None or shapes_of(twin) != shapes_of(model):
        return False
    undo: Undo = []
    left = Left.of(twin, sites, mask.present(sites), undo)
    for name, site in left.sites.items():
        cut_site_(base_of(twin), site, left.kept[name], undo)
    return say_plainly_(twin, recipe_of(twin, left, Special(), {}), undo)


def check_plain(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` where the config of a cut model needs a recipe to describe it."""
    if getattr(model.config, KEY, None) is not None:
        raise UnsupportedModelError(
            f"the config of {type(base_of(model)).__name__} cannot say by its own numbers what is left; prune without "
            "`plain`, where a recipe says it"
        )


def family_of(site: str) -> str:
    """Return what sites of one list of layers have in common: their name without numbers."""
    return _NUMBER.sub("*", site)


def _counts(recipe: Recipe) -> Counts | None:
    """Return what has become of each number of units; None where layers of one list keep other numbers of them."""
    counts: Counts = {}
    by_list: dict[str, list[tuple[int, int]]] = {}
    for name, site in recipe.sites.items():
        if isinstance(site, LayerSite):
            continue
        kept = torch.zeros(site.num_units, dtype=torch.bool)
        kept[list(recipe.kept[name])] = True
        pairs = [(site.num_units, int(kept.sum())), (site.num_groups, int(site.kept_groups(kept).sum()))]
        if not kept.any() or by_list.setdefault(family_of(name), pairs) != pairs:
            return None
        for old, new in pairs:
            if old != new:
                counts.setdefault(old, set()).add(new)
    return counts


def _configs(data: dict[str, Any], counts: Counts) -> Iterator[dict[str, Any]]:
    """Yield configs in which numbers are replaced by what has become of them: none first, then one, and so on.

    A width that a config leaves open, as GPT-2's does, is tried last.
    """
    values = dict(walk(data))
    choices: list[tuple[Place, int]] = [
        (place, new)
        for place, value in values.items()
        if isinstance(value, int) and not isinstance(value, bool)
        for new in sorted(counts.get(value, ()))
    ]
    for number in range(len(choices) + 1):
        for chosen in itertools.combinations(choices, number):
            if len({place for place, _ in chosen}) == number:
                yield changed_data(data, dict(chosen))
    for place, value in values.items():
        for new in set().union(*counts.values()) if value is None else ():
            yield changed_data(data, {place: new})


def _has_shapes_of(model: nn.Module, other: nn.Module) -> bool:
    """Would a checkpoint of `model` fit `other`, which keeps no buffer that the model has in another shape?"""
    buffers = {name: buffer.shape for name, buffer in model.named_buffers()}
    kept = {name: buffer.shape for name, buffer in other.named_buffers()}
    return shapes_of(model) == shapes_of(other) and kept.items() <= buffers.items()


def _floats_of(model: nn.Module) -> list[float]:
    """Return what modules compute with and do not count, such as the scale of attention: no number of units changes it.

    By it a size of heads is told from a number of them, where both are the same.
    """
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, float)]


def _is_alike(model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel, recipe: Recipe) -> bool:
    """Does every module have the class and the counts that it will have once the folder is loaded?"""
    for path, new in after.named_modules():
        module, old = model.get_submodule(path), before.get_submodule(path)
        counted = (name for name, value in vars(new).items() if isinstance(value, PLAIN))
        changed = (name for name in counted if getattr(new, name) != vars(old).get(name))
        if type(module) is not type(new) or any(vars(module).get(name) != getattr(new, name) for name in changed):
            return False
    cut = [path.rpartition(".") for site in recipe.sites.values() for path in site.attributes]
    here, there = base_of(model), base_of(after)
    return all(
        getattr(here.get_submodule(holder), name) == getattr(there.get_submodule(holder), name)
        for holder, _, name in cut
        if not holder.endswith("config")
    )
