"""Which units stay: `Mask` in the numbering of the original model, `PresentMask` among the units that are there now."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import invalid, shown
from secateur.sites.layout import Site
from secateur.support.checks import check_mapping
from secateur.units.by_site import BySite, Saved, json_rows, own_tensor
from secateur.units.grid import grid_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class _Verdicts(BySite):
    """Bool vectors `[units]`, True = kept."""

    _least: ClassVar[int] = 1  # units of a site

    def __post_init__(self) -> None:
        check_mapping("mask", self.values_by_site, "map at least one site to a vector")
        clean = {}
        for site, vector in self.values_by_site.items():
            tensor = own_tensor(f"mask[{shown(site)}]", vector, None)
            if tensor.dtype != torch.bool or tensor.ndim != 1 or tensor.numel() < self._least:
                raise invalid(
                    f"mask[{shown(site)}]", "be a vector of booleans, one for each unit (True = kept)", vector
                )
            clean[site] = tensor
        object.__setattr__(self, "values_by_site", clean)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.kept == other.kept and self.shape == other.shape

    def __hash__(self) -> int:
        return hash(json.dumps(self.kept, sort_keys=True))

    @property
    def kept(self) -> dict[str, list[int]]:
        """Site → the indices of the units that stay."""
        return {site: indices_of(vector) for site, vector in self.items()}

    @property
    def shape(self) -> dict[str, int]:
        """Site → its number of units."""
        return {site: vector.numel() for site, vector in self.items()}

    @property
    def num_units(self) -> int:
        """Units over all sites."""
        return sum(self.shape.values())

    @property
    def num_kept(self) -> int:
        """Units that stay, over all sites."""
        return sum(int(v.sum()) for v in self.values())


class Mask(_Verdicts, Saved):
    """Which units stay: site → bool vector `[units of the original model]`, True = kept, original numbering.

    A unit that an earlier removal took is False.
    """

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the original units that this mask removes."""
        return 1 - self.num_kept / self.num_units

    def __str__(self) -> str:
        return f"kept {self.num_kept} of {self.num_units} units (pruning ratio {self.pruning_ratio:.2f})"

    def __repr__(self) -> str:
        return f"Mask({self}, {len(self)} {'site' if len(self) == 1 else 'sites'})"

    def _repr_html_(self) -> str:
        """Return the grid of units that a notebook shows."""
        return grid_html(repr(self), self, None)

    def plot(self) -> Figure:
        """Draw the grid, units by site: dark stays, a cross goes. `mask.plot().savefig("mask.pdf")` writes it.

        Raises `InvalidInputError` where matplotlib is not installed: `pip install 'secateur[plots]'`.
        """
        from secateur.units.picture import mask_figure

        return mask_figure(self)

    def present(self, sites: Mapping[str, Site]) -> PresentMask:
        """Return the verdicts on the units that are there now; sites that the mask does not name stay whole.

        Raises `InvalidInputError` for a site that the model lacks, a vector
        of another length, and a unit that is marked as kept though an earlier removal took it.
        """
        for name, vector in self.items():
            if name not in sites:
                raise invalid("mask", f"name sites of the model, such as {next(iter(sites))!r}", name)
            site = sites[name]
            if vector.numel() != site.original_num_units:
                raise invalid(f"mask[{name!r}]", f"have {site.original_num_units} entries", vector.numel())
            removed = torch.ones(vector.numel(), dtype=torch.bool)
            removed[list(site.units)] = False
            if gone := indices_of(vector & removed):
                raise invalid(f"mask[{name!r}]", "be False for units that are already removed", gone)
        whole = {name: torch.ones(site.num_units, dtype=torch.bool) for name, site in sites.items()}
        return PresentMask({n: self[n][list(sites[n].units)] if n in self else row for n, row in whole.items()})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"kind": "mask", "mask": {site: vector.tolist() for site, vector in self.items()}}

    @classmethod
    def from_json(cls, data: Any) -> Mask:
        """Rebuild from `to_json`'s data. Raises `InvalidInputError` where the data has another form."""
        rows = json_rows(data, "mask", "mask")
        for site, row in rows.items():
            if not all(isinstance(x, bool) for x in row):
                raise invalid(f"mask[{shown(site)}]", "be a list of true or false", row)
        return cls({site: torch.tensor(row, dtype=torch.bool) for site, row in rows.items()})


class PresentMask(_Verdicts):
    """Which units stay of those that are there now: site → bool vector `[units]`, True = kept, present numbering.

    What gates, cuts and searches work with; it says nothing once the model has lost a unit. A site that has lost all of
    them has an empty vector.
    """

    _least = 0

    def original(self, sites: Mapping[str, Site]) -> Mask:
        """Return the mask in the numbering of the original model, over all `sites`."""
        return Mask({name: original_vector(site, self.get(name)) for name, site in sites.items()})


def units_left(sites: Mapping[str, Site], mask: Mask) -> dict[str, tuple[int, int]]:
    """Return, for each kind of `sites`, how many units there are now, and how many are left with `mask`.

    What lies in a layer that goes, goes too.
    """
    kept = mask.present(sites)
    gone = layers_gone(sites, kept)
    found: dict[str, tuple[int, int]] = {}
    for name, site in sites.items():
        before, after = found.get(site.kind, (0, 0))
        stays = not is_within(name, gone)
        found[site.kind] = (before + site.num_units, after + (int(kept[name].sum()) if stays else 0))
    return found


def layers_gone(sites: Mapping[str, Site], kept: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of the layers that go, of the lists of layers among `sites`."""
    lists = [name for name, site in sites.items() if site.kind == "layers"]
    return [f"{name}.{number}" for name in lists for number in indices_of(~kept[name])]


def is_within(site: str, paths: Iterable[str]) -> bool:
    """Whether a site lies in one of the modules at these paths."""
    return any(site.startswith(f"{path}.") for path in paths)


def check_mask(mask: Any) -> None:
    """Raise `InvalidInputError` unless this is a `Mask`: one among the units that are there now will not do."""
    if not isinstance(mask, Mask):
        remedy = f"load it: secateur.Mask.load({str(mask)!r})" if isinstance(mask, str | Path) else ""
        raise invalid("mask", "be a Mask", mask, remedy)


def original_vector(site: Site, kept: Tensor | None = None) -> Tensor:
    """Return bool `[original units]` for verdicts on the units there now, bool `[units]`; None keeps all of these."""
    left = site.units if kept is None else itertools.compress(site.units, kept.tolist())
    return vector_of(left, site.original_num_units)


def indices_of(vector: Tensor) -> list[int]:
    """Return the indices that a bool vector marks."""
    return vector.nonzero().flatten().tolist()


def vector_of(indices: Any, length: int) -> Tensor:
    """Return the bool vector that marks `indices`."""
    vector = torch.zeros(length, dtype=torch.bool)
    vector[list(indices)] = True
    return vector
