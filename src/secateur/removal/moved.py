"""Names of sites once layers are gone: what lies in a later layer has another path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from secateur.sites.layout import Site
from secateur.sites.recipe import Recipe

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
    """Return a recipe by the names that sites have now, without those that are gone."""
    names = {name: new for name in recipe.sites if (new := moved_path(name, moved)) is not None}
    return replace(
        recipe,
        kept={new: recipe.kept[name] for name, new in names.items()},
        sites={new: moved_site(recipe.sites[name], moved) for name, new in names.items()},
        bypassed=tuple(names[name] for name in recipe.bypassed if name in names),
        reshaped=tuple(names[name] for name in recipe.reshaped if name in names),
    )
