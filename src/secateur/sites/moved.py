"""The recipe of a model whose modules have moved: where a layer is deleted, those behind it get other names.

A removal, and a reader that follows a recipe, note on the module of each site what the recipe calls it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from secateur.errors import CheckpointError
from secateur.sites.layout import Site
from secateur.sites.recipe import KEY, KINDS, Recipe, read_recipe

_MARK = "_secateur_site"  # on the module of a site: its name in the recipe


Moved = Mapping[str, str | None]
"""The new path of every layer of a list that lost some, None where it is gone."""

AnySite = TypeVar("AnySite", bound=Site)


def moved_path(path: str, moved: Moved) -> str | None:
    """Return where the module or parameter at `path` is now, None where it is gone."""
    for old, new in moved.items():
        if path == old or path.startswith(f"{old}."):
            return None if new is None else new + path[len(old) :]
    return path


def moved_site(site: AnySite, moved: Moved) -> AnySite:
    """Return a site that is still there with the paths that it has now."""

    def here(path: str) -> str:
        return moved_path(path, moved) or path  # of what is shared with layers that are gone, such as a table

    return replace(
        site,
        name=here(site.name),
        output=here(site.output),
        slices=tuple(replace(piece, parameter=here(piece.parameter)) for piece in site.slices),
        attributes={here(path): quantity for path, quantity in site.attributes.items()},
    )


def moved_recipe(recipe: Recipe, moved: Moved) -> Recipe:
    """Return a recipe by the names that sites have once layers are `moved`, without those that are gone."""
    return renamed(recipe, {new: name for name in recipe.sites if (new := moved_path(name, moved)) is not None})


def mark_sites_(base: PreTrainedModel, recipe: Recipe) -> None:
    """Note on the module of each site what the recipe calls it."""
    for name in recipe.sites:
        setattr(base.get_submodule(name), _MARK, name)


def present_recipe(base: PreTrainedModel) -> Recipe | None:
    """Return the recipe in a base model's config by the names of today, without the sites that are gone.

    None where there is none. Raises `CheckpointError` where it cannot be followed.
    """
    recipe = read_recipe(base.config)
    return None if recipe is None else by_names_of_today(base, recipe)


def by_names_of_today(base: PreTrainedModel, recipe: Recipe) -> Recipe:
    """Return what a recipe says of the sites whose modules are in `base`, wherever they are: `recipe`, if as it says.

    A site that was copied is there twice. Raises `CheckpointError` for one that cannot have its new name.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    places = {name: name for name in recipe.sites if name in modules and _mark(modules[name]) in (name, None)}
    seen = {id(modules[name]) for name in places}
    for name, module in base.named_modules():
        mark = _mark(module)
        if mark in recipe.sites and id(module) not in seen:
            places[name] = str(mark)
    return recipe if list(places) == list(recipe.sites) == list(places.values()) else renamed(recipe, places)


def renamed(recipe: Recipe, places: dict[str, str]) -> Recipe:
    """Return the recipe of fewer sites, or by other names: `places` maps the name of each to that in `recipe`."""
    return replace(
        recipe,
        kept={now: recipe.kept[before] for now, before in places.items()},
        sites={now: _moved(recipe.sites[before], now) for now, before in places.items()},
        bypassed=tuple(now for now, before in places.items() if before in recipe.bypassed),
        reshaped=tuple(now for now, before in places.items() if before in recipe.reshaped),
    )


def _moved(site: Site, name: str) -> Site:
    """Return the unpruned `site` under another name."""
    if site.name == name:
        return site
    try:
        return KINDS[site.kind].from_json(name, site.to_json())
    except ValueError as error:
        raise CheckpointError(f"`{KEY}` cannot call {site.name} {name}, where it is now: {error}") from None


def _mark(module: nn.Module) -> str | None:
    return vars(module).get(_MARK)
