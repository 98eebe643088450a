"""The `head_pruning` entry of a `config.json`: what a pruned checkpoint tells its reader.

It holds `format_version`, `kept_heads` (site → original indices), `kept_neurons` and `kept_layers` (the same, packed),
`layouts` (what each unit owned in the unpruned model, once for each kind of site), and for the record `scorer`,
`pruning_ratio`, `allocation`, `base_model`, `secateur_version`, and what was done to the weights that stay:
`reconstructed`, `distilled`, `finetuned`. `how_to_load` is a line for who opens the file where secateur is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import CheckpointError, shown
from secateur.models.base_model import base_of
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Runs, Site
from secateur.sites.packing import pack, unpack

KEY = "head_pruning"
PLAIN_KEY = "pruned_from"
"""The same entry of a config whose own numbers describe the smaller model: for the record, no code builds by it."""
REMOVED = "_secateur_removed"  # on a base model that lost units: the entries of its config that tell so
FORMAT_VERSION = 2
KINDS: dict[str, type[AttentionSite | FeedForwardSite | LayerSite]] = {
    cls.kind: cls for cls in (AttentionSite, FeedForwardSite, LayerSite)
}
"""The class of site for each kind of unit."""

_KEPT = {kind: f"kept_{kind}" for kind in KINDS}
HOW_TO_LOAD = "how_to_load"
FOLLOWED = frozenset({"format_version", "layouts", "bypassed", "reshaped", *_KEPT.values()})
"""What a recipe is made of, which digests are of."""
OWN_NAMES = FOLLOWED | {HOW_TO_LOAD}
"""What secateur alone writes; every other name in a recipe is for the record."""
_LINE = (
    "import secateur before from_pretrained, without ignore_mismatched_sizes, which would put random weights in place "
    "of the smaller ones; `secateur export` writes a folder that loads without secateur"
)
TRAINED = ("distilled", "finetuned")
"""What the record says of a model that was trained after its heads went."""


Kept = dict[str, tuple[int, ...]]
"""Site → the original indices of its units that stay."""


@dataclass(frozen=True)
class Recipe:
    """How to make the pruned model out of the unpruned one.

    `kept` maps each site to the original indices of its units that stay; `sites` describes the unpruned sites;
    `bypassed` names emptied sites whose own code is left out, since it needs a head to run, and
    `reshaped` sites whose code asks for the width of all heads (reshaped.py); `record` is what a reader may want to
    know and no code depends on.
    """

    kept: Kept
    sites: dict[str, Site]
    bypassed: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def to_json(self, how_to_load: bool = True) -> dict[str, Any]:
        """Return the config entry; without the line that tells how to load it where it is for the record alone."""
        layouts: list[dict[str, Any]] = []
        for name, site in self.sites.items():
            layout = site.to_json()
            for known in layouts:
                if {k: v for k, v in known.items() if k != "sites"} == layout:
                    known["sites"].append(name)
                    break
            else:
                layouts.append({"sites": [name], **layout})
        return {
            "format_version": FORMAT_VERSION,
            **({HOW_TO_LOAD: _LINE} if how_to_load else {}),
            **{_KEPT[kind]: kept for kind in KINDS if (kept := self._kept(kind)) or kind == "heads"},
            **({"bypassed": list(self.bypassed)} if self.bypassed else {}),
            **({"reshaped": list(self.reshaped)} if self.reshaped else {}),
            **self.record,
            "layouts": layouts,
        }

    def _kept(self, kind: str) -> dict[str, Any]:
        """Return the units that stay of one kind by site: heads as a list, and what may be thousands packed."""
        kept = {name: units for name, units in self.kept.items() if self.sites[name].kind == kind}
        return {name: list(units) if kind == "heads" else pack(units) for name, units in kept.items()}

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Rebuild from `to_json`'s data. Raises `CheckpointError` for an unknown version and for impossible content."""
        if not isinstance(data, dict):
            raise CheckpointError(f"`{KEY}` in the config must be an object, got {type(data).__name__}")
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"`{KEY}.format_version` must be a number from 1 to {FORMAT_VERSION}, got {shown(version)}; "
                "a newer secateur may read it"
            )
        runs = Runs()
        try:
            sites: dict[str, Site] = {
                str(name): KINDS[layout.get("kind", AttentionSite.kind)].from_json(str(name), layout, runs)
                for layout in data["layouts"]
                for name in layout["sites"]
            }
            kept = {str(site): tuple(indices) for site, indices in data["kept_heads"].items()}
            for kind in (FeedForwardSite.kind, LayerSite.kind):
                for site, text in data.get(_KEPT[kind], {}).items():
                    kept[str(site)] = unpack(text, sites[site].num_units)
            bypassed, reshaped = (tuple(map(str, data.get(key, []))) for key in ("bypassed", "reshaped"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error)[:200].split())
            raise CheckpointError(f"`{KEY}` in the config is damaged: {type(error).__name__}: {reason}") from None
        _check(kept, sites, bypassed, reshaped)
        return cls(kept, sites, bypassed, reshaped, {k: v for k, v in data.items() if k not in OWN_NAMES})


def note_(model: PreTrainedModel, name: str) -> None:
    """Record `name`, such as "finetuned", in the config of a pruned model; of another nothing is recorded."""
    for config in (model.config, base_of(model).config):
        for key in (KEY, PLAIN_KEY):
            if isinstance(entry := getattr(config, key, None), dict):
                entry[name] = True


def _check(kept: Kept, sites: Mapping[str, Site], bypassed: tuple[str, ...], reshaped: tuple[str, ...]) -> None:
    """Raise `CheckpointError` for a recipe whose parts do not fit each other."""
    if not kept or set(kept) != set(sites):
        raise CheckpointError(
            f"`{KEY}` must give kept units and a layout for the same sites, got {shown(sorted(kept)[:3])}"
        )
    for site, indices in kept.items():
        total = sites[site].num_units
        whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < total for i in indices)
        if not whole or list(indices) != sorted(set(indices)):
            raise CheckpointError(
                f"`{KEY}.kept_heads[{shown(site)}]` must be increasing head indices below {total}, got "
                f"{shown(list(indices))}"
            )
    for site in bypassed:
        if kept.get(site, (0,)):
            raise CheckpointError(f"`{KEY}.bypassed` must name sites without heads, got {shown(site)}")
    for site in reshaped:
        if site not in kept:
            raise CheckpointError(f"`{KEY}.reshaped` must name sites of the recipe, got {shown(site)}")


def read_recipe(config: PreTrainedConfig) -> Recipe | None:
    """Return the recipe that a config carries, or None. Raises `CheckpointError` where it cannot be followed."""
    data = getattr(config, KEY, None)
    return None if data is None else Recipe.from_json(data)


def read_record(config: PreTrainedConfig) -> Recipe | None:
    """Return what a config tells of the removals that led to it, as a recipe or for the record; None where nothing."""
    data = getattr(config, PLAIN_KEY, None)
    return read_recipe(config) if data is None else Recipe.from_json(data)
