"""What is left to be cut once whole layers are gone, by the names that it has then."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from secateur.removal.shortened import shorten_
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.sites.moved import moved_path, moved_site
from secateur.sites.narrowing import Undo
from secateur.units.masks import PresentMask


@dataclass(frozen=True)
class Left:
    """What to cut once layers are gone: `sites` by their names then, and which of their units are `kept`.

    `layers` has the lists that lost some, with the original numbers of those that stay.
    """

    sites: dict[str, Site]
    kept: dict[str, Tensor]
    layers: dict[str, tuple[LayerSite, tuple[int, ...]]]

    @classmethod
    def of(cls, model: PreTrainedModel, sites: Mapping[str, Site], kept: PresentMask, undo: Undo) -> Left:
        """Take layers out of `model` where the mask drops some, and say what is left to be cut."""
        moved: dict[str, str | None] = {}
        layers: dict[str, tuple[LayerSite, tuple[int, ...]]] = {}
        for name, site in sites.items():
            if isinstance(site, LayerSite) and not kept[name].all():
                moved |= shorten_(model, site, kept[name], undo)
                layers[name] = (site, tuple(itertools.compress(site.units, kept[name].tolist())))
        others = {name: site for name, site in sites.items() if not isinstance(site, LayerSite)}
        names = {name: new for name in others if (new := moved_path(name, moved)) is not None}
        here = {new: moved_site(others[name], moved) for name, new in names.items()}
        return cls(here, {new: kept[name] for name, new in names.items()}, layers)
