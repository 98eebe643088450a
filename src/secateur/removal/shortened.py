"""Whole layers gone: a shorter list, and everything in the model that counts layers as a shorter model would have it.

Nothing is known of any model: the model is built twice on the meta device, from its config and from one that asks for
fewer layers, and what differs between the two is what changes. A cut that no config can ask for is refused. So a folder
with fewer layers, and nothing else gone, loads where secateur is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import RemovalError
from secateur.models.base_model import base_of
from secateur.removal.twins import Place, changed_data, shapes_of, take_over_, twin_of, walk
from secateur.sites.layers import LayerSite
from secateur.sites.moved import Moved, moved_recipe
from secateur.sites.narrowing import Undo
from secateur.sites.recipe import KEY, PLAIN_KEY, read_recipe

_STAGES = ("out_features", "out_indices", "stage_names")  # of a backbone's config


def shorten_(model: PreTrainedModel, site: LayerSite, kept: Tensor, undo: Undo) -> dict[str, str | None]:
    """Remove from `model` the layers of `site` that `kept` (bool `[layers]`) drops; weights stay the same objects.

    `undo` collects what puts them back, in order. Returns the new path in the base model for the path of every layer
    that was there, None where it is gone. Raises `RemovalError` where no config asks for the shorter model.
    """
    stays = kept.nonzero().flatten().tolist()
    places = {f"{site.name}.{old}": f"{site.name}.{new}" for new, old in enumerate(stays)}
    moved = {f"{site.name}.{old}": places.get(f"{site.name}.{old}") for old in range(len(kept))}
    before = twin_of(model, model.config.to_dict())
    if before is None or shapes_of(before) != shapes_of(model):
        raise RemovalError(
            f"{type(model).__name__} is not what its config says, so its layers cannot be counted anew; take layers "
            "out first, and wrap or change the model afterwards; the model is unchanged"
        )
    after = _shorter_twin(model, site, stays, moved)
    old = [dict(one.named_modules()) for one in (model, before)]
    for path, layers in _lists(after).items():
        there: Any = model.get_submodule(path)
        if len(layers) == len(stays) < len(there) == len(kept):
            _keep_entries_(there, stays, undo)
            _keep_entries_(before.get_submodule(path), stays, [])
    for one, modules, steps in ((model, old[0], undo), (before, old[1], [])):
        _inherit_(one, after, modules, steps)
    take_over_(model, before, after, undo)
    return moved


def _shorter_twin(model: PreTrainedModel, site: LayerSite, stays: list[int], moved: Moved) -> PreTrainedModel:
    """Return the model on the meta device with the layers in `stays` alone, built from a config that asks for it."""
    whole = {key: value for key, value in model.config.to_dict().items() if key != PLAIN_KEY}
    recipe = read_recipe(model.config)
    if recipe is not None:
        left = {site.name: tuple(site.units[layer] for layer in stays)} if site.name in recipe.kept else {}
        recipe = moved_recipe(recipe, moved)
        whole[KEY] = replace(recipe, kept={**recipe.kept, **left}).to_json()
    for data in _shorter_configs(whole, site.num_units, stays):
        twin = twin_of(model, data)
        if twin is None or len(_lists(base_of(twin)).get(site.name, ())) != len(stays):
            continue
        wanted, there = _wanted(model, twin, site, stays), shapes_of(model)
        found = shapes_of(twin)
        inherited = found.keys() - wanted.keys()  # what the first layer has for all, such as T5's table of biases
        if found == wanted | {name: there[name] for name in inherited if name in there}:
            return twin
    raise RemovalError(
        f"{type(base_of(model)).__name__} cannot be without these layers of {site.name}: no config asks for a model "
        "that has the others as they are; the model is unchanged"
    )


def _shorter_configs(data: dict[str, Any], count: int, stays: list[int]) -> Iterator[dict[str, Any]]:
    """Yield configs with fewer layers: one number or two that are `count`, and lists with an entry a layer, change."""
    places = [path for path, value in walk(data) if value == count and not isinstance(value, bool | list)]
    for number in (1, 2):
        for chosen in itertools.combinations(places, number):
            for is_per_layer in (_says_layer, _no_list, _says_kinds):
                changes: dict[Place, Any] = dict.fromkeys(chosen, len(stays))
                for path, value in walk(data):
                    beside = any(path[:-1] == one[:-1] for one in chosen)
                    if beside and isinstance(value, list) and len(value) == count and is_per_layer(path, value):
                        changes[path] = [value[layer] for layer in stays]
                yield changed_data(_without_stages(data, count), changes)


def _without_stages(data: dict[str, Any], count: int) -> dict[str, Any]:
    """Leave out which layers a backbone returns where that is the last one, as it is unasked: it is told by number."""
    last = data.get("out_indices") == [count]
    return {key: value for key, value in data.items() if not last or key not in _STAGES}


def _says_layer(path: Place, value: list[Any]) -> bool:
    """Has the list an entry a layer, as its name says?"""
    return "layer" in path[-1]


def _no_list(path: Place, value: list[Any]) -> bool:
    """No list counts: one as long as there are layers may be about something else."""
    return False


def _says_kinds(path: Place, value: list[Any]) -> bool:
    """Has the list an entry a layer, as it names kinds, such as of attention?"""
    return "layer" in path[-1] or all(isinstance(entry, str) for entry in value)


def _wanted(model: nn.Module, twin: nn.Module, site: LayerSite, stays: list[int]) -> dict[str, torch.Size]:
    """Return the shapes of the model's weights, by name, once the layers are gone, in every list like theirs."""
    lists = {
        path
        for path, layers in _lists(model).items()
        if len(layers) == site.num_units and len(_lists(twin).get(path, ())) == len(stays)
    }
    wanted = {}
    for name, shape in shapes_of(model).items():
        path = next((one for one in lists if name.startswith(f"{one}.")), None)
        if path is None:
            wanted[name] = shape
            continue
        number, _, rest = name[len(path) + 1 :].partition(".")
        if int(number) in stays:
            wanted[f"{path}.{stays.index(int(number))}.{rest}"] = shape
    return wanted


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _keep_entries_(layers: Any, stays: list[int], undo: Undo) -> None:
    entries = dict(layers._modules)
    undo.append(lambda: setattr(layers, "_modules", entries))
    layers._modules = {str(new): entries[str(old)] for new, old in enumerate(stays)}


def _inherit_(model: nn.Module, after: nn.Module, old: Mapping[str, nn.Module], undo: Undo) -> None:
    """Hand modules that only the first layer has on to the layer that is the first one now."""
    there = dict(model.named_modules())
    for path in dict(after.named_modules()).keys() - there.keys():
        above, _, name = path.rpartition(".")
        if above in there:  # what lies deeper comes with it
            parent = there[above]
            undo.append(partial(parent._modules.pop, name))
            parent._modules[name] = old[path]
