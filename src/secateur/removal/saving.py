"""Is the model that is about to be saved the one that its folder will give back? Asked before anything is written.

A recipe names the sites and weights that were there when heads went. After that an adapter is merged, or a layer
deleted, and the names are others. What follows from where the sites' modules are now is mended; then the model is built
from the config that will be saved, without weights, as `from_pretrained` will build it, and the two are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import CheckpointError, SecateurError
from secateur.models.base_model import base_of
from secateur.models.loading import quiet_transformers
from secateur.removal.construction import on_its_own
from secateur.removal.replay import missing_sites
from secateur.sites.layout import Site
from secateur.sites.moved import by_names_of_today, mark_sites_, renamed
from secateur.sites.recipe import KEY, Recipe, read_recipe
from secateur.support.files import temporary_folder

_WRAPPED = ".base_layer"  # what PEFT calls the layer inside an adapter
_REMEDY = (
    "merge or unload adapters first (`merge_and_unload`), let the config count the layers that are left, or change "
    "the model before heads are removed from it; nothing was written"
)


def prepare_to_save_(model: PreTrainedModel) -> None:
    """Let the recipe in the model's config say what the model is now. Raises `CheckpointError` where none can.

    Only what the recipe is about is compared: shapes within the base model, and which weights there are within the
    lists of layers that hold sites. A class that is not built from a config alone is not compared.
    """
    recipe, base = read_recipe(model.config), base_of(model)
    if recipe is None:
        return
    try:
        mended = _mended(model, base, recipe)
        found = None if mended is None else mended.to_json()
        built = _build(model, found)
    except SecateurError as error:
        raise CheckpointError(f"{type(model).__name__} would not load once saved: {error}; {_REMEDY}") from None
    if built is not None and (difference := _first_difference(base, base_of(built), recipe)):
        raise CheckpointError(f"{type(model).__name__} would not load as it is once saved: {difference}; {_REMEDY}")
    if mended is recipe:
        return
    for config in (model.config, base.config):
        if mended is None:
            vars(config).pop(KEY, None)
        else:
            setattr(config, KEY, found)
    if mended is not None:
        mark_sites_(base, mended)


def held_part(base: PreTrainedModel, recipe: Recipe) -> Recipe | None:
    """Return what a recipe says of the sites that `base` holds, where it holds no layers like those of the others.

    So it is where the encoder alone is read from an encoder-decoder. None where a site is missing from a list of layers
    that is there, or where no site is: then the recipe is another model's.
    """
    missing = set(missing_sites(base, recipe))
    modules = dict(base.named_modules(remove_duplicate=False))
    if not missing or len(missing) == len(recipe.sites) or any(_layers_of(name) in modules for name in missing):
        return None
    return renamed(recipe, {name: name for name in recipe.sites if name not in missing})


def _layers_of(site: str) -> str:
    """Return the list of layers that holds a site, or the site itself where none does."""
    found = re.match(r"(.*?)\.\d+(\.|$)", site)
    return found[1] if found else site


def _mended(model: PreTrainedModel, base: PreTrainedModel, recipe: Recipe) -> Recipe | None:
    """Return the recipe by the names of today: `recipe` itself where they are the same, None where no site is left."""
    mended = by_names_of_today(base, recipe)
    if not mended.sites:
        return None
    weights = {name for name, _ in base.named_parameters(remove_duplicate=False)}
    if all(piece.parameter in weights for site in mended.sites.values() for piece in site.slices):
        return mended
    plain = _build(model, None)
    if plain is None:
        return mended
    weights = {name for name, _ in base_of(plain).named_parameters(remove_duplicate=False)}
    sites = {name: _without_adapters(site, weights) for name, site in mended.sites.items()}
    return mended if sites == mended.sites else replace(mended, sites=sites)


def _without_adapters(site: Site, weights: set[str]) -> Site:
    """Return an unpruned site by the names of `weights`, those of a model that has no adapters around its layers."""
    renamed = [
        replace(piece, parameter=piece.parameter.replace(_WRAPPED, "")) if piece.parameter not in weights else piece
        for piece in site.slices
    ]
    slices = tuple(piece for piece in renamed if piece.parameter in weights)
    return replace(site, slices=slices, output=site.output.replace(_WRAPPED, ""))


def _build(model: PreTrainedModel, recipe: dict[str, Any] | None) -> PreTrainedModel | None:
    """Build, without weights, what a reader will from the model's config with this recipe; None if that needs more.

    Raises `CheckpointError` where the recipe does not fit, or the config cannot be read back.
    """
    try:
        with temporary_folder() as folder:  # read as a folder is: an infinity is no number in JSON
            model.config.to_json_file(folder / "config.json")
            data = type(model.config).get_config_dict(folder)[0]
        config: PreTrainedConfig = type(model.config).from_dict(
            {**data, KEY: recipe, "architectures": [type(model).__name__]}
        )
    except Exception as error:  # transformers checks what a config counts, such as its layers
        raise CheckpointError(f"its config cannot be read back: {' '.join(str(error).split())[:200]}") from None
    try:
        with on_its_own(), quiet_transformers(progress=True), torch.random.fork_rng([]), torch.device("meta"):
            return type(model)(config)
    except SecateurError:
        raise
    except Exception:  # a class of the user's own may ask for more than a config, or for values
        return None


def _first_difference(base: PreTrainedModel, built: PreTrainedModel, recipe: Recipe) -> str | None:
    """Return what a reader would not find as it is in `base`, of a model that is `built` without weights."""
    layers = tuple({f"{_layers_of(name)}." for name in recipe.sites})
    here, there = dict(_saved_tensors(base)), dict(_saved_tensors(built))
    for name in {**there, **here}:
        if name in here and name in there:
            if here[name] != there[name]:
                return f"{name} has the shape {here[name]}, and {there[name]} by the config"
        elif name.startswith(layers):
            return f"{name} is not in the {'config' if name in here else 'model'}'s layers"
    modules = dict(base.named_modules(remove_duplicate=False))
    for name, module in built.named_modules():
        # Which entries of a bias for all heads a site picks shows in no shape.
        heads = [vars(one).get("secateur_heads") for one in (module, modules.get(name, module))]
        if heads[0] != heads[1]:
            return f"{name} has the original heads {heads[1]}, and {heads[0]} by the config"
    return None


def _saved_tensors(base: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of the base model that a checkpoint holds."""
    for name, module in base.named_modules(remove_duplicate=False):
        left_out = module._non_persistent_buffers_set
        kept = {key: buffer for key, buffer in module._buffers.items() if key not in left_out}
        for key, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                yield f"{name}.{key}" if name else key, tuple(tensor.shape)
