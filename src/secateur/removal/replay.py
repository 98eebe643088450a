"""From a recipe to the smaller model: weights and attributes narrowed, site by site.

A standalone export ships this file, and those of this package that it imports, beside the model. So nothing here, nor
in them, may need anything but torch and transformers.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import CheckpointError, SecateurError, UnsupportedModelError, shown
from secateur.models.base_model import base_of
from secateur.removal.adapted import narrow_bias_, set_in_config_
from secateur.removal.emptied import bypass_, count_tokens_, keep_bias_
from secateur.removal.reshaped import reshape_
from secateur.sites.forward import takes_bias
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.sites.moved import mark_sites_
from secateur.sites.narrowing import Undo, narrow_, set_attribute_
from secateur.sites.recipe import KEY, Recipe, read_recipe

_DONE = "_secateur_narrowed"  # on a base model: its recipe has been followed


class Rebuilt:
    """Mixed into a model class that a standalone export ships: its constructor ends by following the config's recipe.

    Where secateur is installed and has done so already, nothing is left to do.
    """

    def post_init(self) -> None:
        """Finish as the model class does, then narrow."""
        own: Any = super()
        own.post_init()
        model: Any = self
        rebuild_(model)


def rebuild_(model: PreTrainedModel) -> None:
    """Follow the recipe in the model's config, where there is one, once for each base model.

    Works on weights that are random or on the meta device, as they are inside a constructor. Raises `CheckpointError`
    for a recipe that does not fit.
    """
    recipe, base = read_recipe(model.config), base_of(model)
    if recipe is None or getattr(base, _DONE, False):
        return
    missing = missing_sites(base, recipe)
    if missing:
        raise CheckpointError(f"`{KEY}` names the site {shown(missing[0])}, which {type(base).__name__} does not have")
    try:
        # `from_pretrained` builds models on the meta device, where index vectors would have no values.
        with torch.device("cpu"):
            replay_(base, recipe)
    except SecateurError as error:
        raise CheckpointError(f"`{KEY}` in the config does not fit {type(base).__name__}: {error}") from None
    setattr(base, _DONE, True)
    mark_sites_(base, recipe)


def missing_sites(base: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Return the sites of `recipe` that are no modules of `base`."""
    modules = dict(base.named_modules(remove_duplicate=False))
    return [site for site in recipe.sites if site not in modules]


def replay_(base: PreTrainedModel, recipe: Recipe) -> None:
    """Narrow an unpruned, perhaps weightless, base model as `recipe` says. Raises where the two do not fit."""
    for name, site in recipe.sites.items():
        if isinstance(site, LayerSite):  # the config asks for the layers that are left
            layers = len(list(base.get_submodule(name).children()))
            if layers != len(recipe.kept[name]):
                raise UnsupportedModelError(f"{name} has {layers} layers, the recipe keeps {len(recipe.kept[name])}")
            continue
        for piece in site.slices:
            try:
                shape = base.get_parameter(piece.parameter).shape
            except AttributeError:
                raise UnsupportedModelError(f"{type(base).__name__} has no weight {shown(piece.parameter)}") from None
            if piece.axis >= len(shape) or shape[piece.axis] != len(piece.owners):
                raise UnsupportedModelError(
                    f"{piece.parameter} has the shape {tuple(shape)}, the recipe expects {len(piece.owners)} "
                    f"along axis {piece.axis}"
                )
        for path in site.attributes:
            if not _is_count(base, path):
                raise UnsupportedModelError(f"{type(base).__name__} has no number {shown(path)}")
        kept = torch.zeros(site.num_units, dtype=torch.bool)
        kept[list(recipe.kept[name])] = True
        site.check(kept)
        cut_site_(base, site, kept)
        if name in recipe.bypassed:
            bypass_(base, site)
        if name in recipe.reshaped:
            reshape_(base.get_submodule(name), site, len(recipe.kept[name]))


def cut_site_(base: PreTrainedModel, site: Site, kept: Tensor, undo: Undo | None = None) -> None:
    """Narrow the weights and attributes of one site to the units in `kept` (bool `[units]`); works on meta weights.

    `undo` collects what puts them back, in order. Nothing is proved here: see `remove_`.
    """
    if bool(kept.all()):
        return
    undo = [] if undo is None else undo
    narrow_(base, site, kept, undo)
    counts = site.counts(kept)
    for path, quantity in site.attributes.items():
        holder_path, _, attribute = path.rpartition(".")
        if holder_path.endswith(".config"):
            set_in_config_(base, path, counts[quantity], undo)
        else:
            set_attribute_(base.get_submodule(holder_path), attribute, counts[quantity], undo)
    if not isinstance(site, AttentionSite):
        if not kept.any():
            keep_bias_(base, site, undo)
        return
    module = base.get_submodule(site.name)
    if takes_bias(module):
        narrow_bias_(module, site, tuple(itertools.compress(site.units, kept.tolist())), undo)
    if not kept.any():
        count_tokens_(module, undo)


def _is_count(base: PreTrainedModel, path: str) -> bool:
    """Does `path` name a whole number that belongs to a module of `base`, or to the config that a module reads?"""
    holder, _, name = path.rpartition(".")
    try:
        owner: Any = base.get_submodule(holder.removesuffix(".config"))
    except AttributeError:
        return False
    if holder.endswith(".config"):
        owner = getattr(owner, "config", None)
    value = getattr(owner, name, None)
    return isinstance(value, int) and not isinstance(value, bool)
