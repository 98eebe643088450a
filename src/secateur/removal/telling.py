"""What the config of a cut model tells: by its own numbers where it can, and by a recipe elsewhere."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import invalid
from secateur.models.base_model import base_of
from secateur.models.names import original_name
from secateur.removal.adapted import ConfigView
from secateur.removal.left import Left
from secateur.removal.proving import Special
from secateur.sites.layout import AttentionSite
from secateur.sites.moved import mark_sites_, present_recipe
from secateur.sites.recipe import KEY, OWN_NAMES, PLAIN_KEY, REMOVED, Recipe


def check_record(record: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` unless the record is JSON and leaves what a recipe holds alone."""
    if taken := sorted(OWN_NAMES & set(record)):
        raise invalid("record", f"not have the names {', '.join(sorted(OWN_NAMES))}", taken)
    try:
        json.dumps(record)
    except (TypeError, ValueError):
        raise invalid("record", "hold what JSON can hold", dict(record)) from None


def tell_(model: PreTrainedModel, recipe: Recipe, is_plain: bool, before: Mapping[str, Any]) -> None:
    """Put the recipe into the configs of the model and of its base model; for the record alone where these are plain.

    The base model notes which entries are others than `before`, as the whole config had them: a model that it is a part
    of has to tell of them too.
    """
    base = base_of(model)
    if not is_plain:  # else they are its own already
        give_own_configs_(model)
    for config in (model.config, base.config):
        vars(config).pop(PLAIN_KEY, None)
        setattr(config, PLAIN_KEY if is_plain else KEY, recipe.to_json(how_to_load=not is_plain))
    after = base.config.to_dict()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    setattr(base, REMOVED, frozenset(changed | vars(base).get(REMOVED, set())))
    if not is_plain:
        mark_sites_(base, recipe)


def recipe_of(model: PreTrainedModel, left: Left, special: Special, record: Mapping[str, Any]) -> Recipe:
    """Return the recipe of all removals so far, by the names that sites have now."""
    earlier = present_recipe(base_of(model)) or Recipe({}, {})
    origin = original_name(model)
    record = {**({"base_model": origin} if origin else {}), **earlier.record, **record}
    if hasattr(base_of(model).config, PLAIN_KEY) and not model.name_or_path:
        record.pop("base_model", None)  # units count from a model that was cut in between and is nowhere on disk
    units_now = {
        name: tuple(itertools.compress(site.units, left.kept[name].tolist())) for name, site in left.sites.items()
    }
    # What an earlier recipe says of a site is of the unpruned model; a site that none names is unpruned now.
    now = left.sites | {name: site for name, (site, _) in left.layers.items()}
    sites = earlier.sites | {name: site for name, site in now.items() if name not in earlier.sites}
    kept_units = earlier.kept | units_now | {name: units for name, (_, units) in left.layers.items()}
    there = {
        name: site
        for name, site in sites.items()
        if isinstance(site, AttentionSite) or len(kept_units[name]) < site.original_num_units
    }
    heads = [site for site in there.values() if isinstance(site, AttentionSite)]
    of_heads = {}
    if heads:
        ratio = 1 - sum(len(kept_units[s.name]) for s in heads) / sum(s.original_num_units for s in heads)
        of_heads["pruning_ratio"] = round(ratio, 6)
    return Recipe(
        {name: kept_units[name] for name in there},
        there,
        bypassed=tuple(dict.fromkeys([*earlier.bypassed, *special.bypassed])),
        reshaped=tuple(dict.fromkeys([*earlier.reshaped, *special.reshaped])),
        record={**record, **of_heads},
    )


def carry_over_(base: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let the config of `model` tell what that of its base model tells of removals, where it is another object."""
    names = {KEY, PLAIN_KEY, *vars(base).get(REMOVED, ())}
    told = {name: getattr(base.config, name, None) for name in names}
    if all(_same(getattr(model.config, name, None), value) for name, value in told.items()):
        return
    give_own_configs_(model)
    for name, value in told.items():
        if value is not None or hasattr(model.config, name):
            setattr(model.config, name, value)
    for key in (KEY, PLAIN_KEY):
        if told[key] is None:
            vars(model.config).pop(key, None)


def is_told(part: nn.Module, config: Any) -> bool:
    """Does a config, or one within it, have what the config of `part` tells of removals?"""
    mine = vars(part.config)
    inner = config if isinstance(config, dict) else vars(config)  # a part's config as a user's own class may keep it
    if all(_same(inner.get(name), mine.get(name)) for name in (KEY, PLAIN_KEY, *getattr(part, REMOVED))):
        return True
    return any(is_told(part, one) for one in inner.values() if isinstance(one, PreTrainedConfig | dict))


def _same(one: Any, other: Any) -> bool:
    """Are two entries of configs equal? Configs by their data, as one whose layers differ compares with none."""
    one, other = (value.to_dict() if isinstance(value, PreTrainedConfig) else value for value in (one, other))
    return bool(one == other)


def give_own_configs_(model: nn.Module) -> None:
    """Replace the configs that the modules hold by copies: another model built from the same object stays unpruned."""
    copies: dict[int, Any] = {}
    originals = []  # kept alive meanwhile, since the copies are looked up by id
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            originals.append(config)
            module.config = copies[id(config)] if id(config) in copies else copy.deepcopy(config, copies)
    for module in model.modules():
        view = getattr(module, "config", None)
        if isinstance(view, ConfigView):
            view.of = copies.get(id(view.of), view.of)
