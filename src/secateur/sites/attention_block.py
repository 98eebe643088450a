"""What one forward pass showed of an attention block, and the site that it makes, also of a block pruned before."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.errors import UnsupportedModelError
from secateur.sites.forward import reads_config
from secateur.sites.layout import AttentionSite, Slice
from secateur.sites.recipe import Recipe

# Attributes that modelling code reads at run time, by what they count. An attribute is adjusted only where its value
# is the one expected, and every removal is proved afterwards, so a name too many does no harm.
_ATTRIBUTES = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "num_attn_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "group": ("num_key_value_groups", "n_rep"),
    "width": ("all_head_size", "inner_dim", "split_size", "embed_dim"),
}


@dataclass
class AttentionBlock:
    """An attention block as it is now: `num_heads` heads of `width` numbers each, and what of it each head owns.

    `name` is the path of `module`, `output` that of its output projection, None until one is seen.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    width: int
    slices: list[Slice] = field(default_factory=list)
    output: str | None = None

    def as_site(self, recipe: Recipe | None, weights: Collection[str]) -> AttentionSite:
        """Return the site. `recipe` says what was removed before, and `weights` are all names of parameters.

        Raises `UnsupportedModelError` where no output projection was seen, and where the recipe says otherwise.
        """
        if self.output is None:
            raise UnsupportedModelError(
                f"site {self.name}: no linear layer reads the heads side by side and apart from each other, so none "
                "can be narrowed"
            )
        site = AttentionSite(
            name=self.name,
            num_units=self.num_heads,
            num_groups=self.num_kv_heads,
            width=self.width,
            slices=tuple(self.slices),
            attributes=self._attributes(),
            output=self.output,
            units=tuple(range(self.num_heads)),
            original_num_units=self.num_heads,
            original_num_groups=self.num_kv_heads,
        )
        return site if recipe is None or self.name not in recipe.kept else _pruned(site, recipe, weights)

    def _attributes(self) -> dict[str, str]:
        """Return which attributes of the module, or of the config that it reads, count what."""
        counts = {
            "heads": self.num_heads,
            "key_value_heads": self.num_kv_heads,
            "group": self.num_heads // self.num_kv_heads if self.num_kv_heads else 0,
            "width": self.num_heads * self.width,
        }
        names = [(name, quantity) for quantity, names in _ATTRIBUTES.items() for name in names]
        return {
            f"{self.name}.{name}": quantity
            for name, quantity in names
            if _is_count(getattr(self.module, name, None), counts[quantity])
        } | {
            f"{self.name}.config.{name}": quantity
            for name, quantity in names
            if reads_config(self.module, name) and _is_count(getattr(self.module.config, name, None), counts[quantity])
        }


def unpruned_site(recipe: Recipe, name: str) -> AttentionSite:
    """Return what the recipe says of an attention block before heads were removed from it."""
    site = recipe.sites[name]
    assert isinstance(site, AttentionSite)
    return site


def _pruned(site: AttentionSite, recipe: Recipe, weights: Collection[str]) -> AttentionSite:
    """Return `site`, seen in a pruned model, with its heads' original numbers."""
    unpruned, units = unpruned_site(recipe, site.name), recipe.kept[site.name]
    if len(units) != site.num_units:
        raise UnsupportedModelError(
            f"site {site.name}: the config's recipe keeps {len(units)} heads but the model has {site.num_units}"
        )
    # What was seen when all heads were there: a lone head does not show what it owns of a table. Weights that have
    # something around them since then, such as an adapter, have other names, and more belongs to a head.
    kept = torch.zeros(unpruned.num_units, dtype=torch.bool)
    kept[list(units)] = True
    slices = unpruned.kept_slices(kept)
    return replace(
        site,
        slices=slices if all(piece.parameter in weights for piece in slices) else site.slices,
        units=units,
        original_num_units=unpruned.num_units,
        original_num_groups=unpruned.num_groups,
    )


def _is_count(value: Any, expected: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == expected
