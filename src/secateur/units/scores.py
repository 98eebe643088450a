"""How important units are: `Scores` in the numbering of the original model, `PresentScores` of what is there now."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import invalid, shown
from secateur.sites.layout import Site
from secateur.sites.recipe import KINDS
from secateur.support.checks import check_mapping, check_whole
from secateur.units.by_site import BySite, Saved, json_rows, own_tensor
from secateur.units.grid import grid_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class _Scores(BySite):
    """Float64 vectors `[units]`, higher = keep, in groups of units that share weights.

    `num_groups` holds, for each site, how many groups of one size its units form: for heads the key-value heads that
    they read, and by default as many as there are units. `scorer` names the criterion. `interactions` holds, for the
    sites of a criterion that knows them, a symmetric float64 matrix `[units, units]`: its sum over the rows and columns
    of several units is what removing all of them costs, 0 for units already removed; `select` takes it into account.
    `kinds` says of which kind the units of a site are, "heads" where it does not name the site.
    """

    num_groups: dict[str, int] = field(default_factory=dict)
    scorer: str = ""
    interactions: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    _may_be_empty: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.values_by_site != {} or not self._may_be_empty:
            check_mapping("scores", self.values_by_site, "map at least one site to a vector")
        for name in ("num_groups", "interactions", "kinds"):
            if not isinstance(getattr(self, name), Mapping):
                raise invalid(name, "map sites to what is known of them", getattr(self, name))
        if not isinstance(self.scorer, str):
            raise invalid("scorer", "be a text", self.scorer)
        clean = {site: _finite(site, vector) for site, vector in self.values_by_site.items()}
        object.__setattr__(self, "values_by_site", clean)
        object.__setattr__(self, "num_groups", {site: self._groups(site) for site in clean})
        object.__setattr__(self, "interactions", {site: self._matrix(site) for site in self.interactions})
        object.__setattr__(self, "kinds", {site: self._kind(site) for site in clean})

    def _groups(self, site: str) -> int:
        """Return the number of a site's groups. Raises `InvalidInputError` unless they are of one size."""
        vector = self[site]
        count = self.num_groups.get(site, vector.numel())
        check_whole(f"num_groups[{shown(site)}]", count)
        if vector.numel() % count:
            raise invalid(f"num_groups[{shown(site)}]", f"divide the site's {vector.numel()} units evenly", count)
        # A removal leaves equal groups (see `Site.check`), so other scores are of no model.
        sizes = (vector > -math.inf).view(count, -1).sum(dim=1).tolist()
        if len(set(sizes) - {0}) > 1:
            raise invalid(f"scores[{shown(site)}]", "have as many units in every group that is there", sizes)
        return count

    def _kind(self, site: str) -> str:
        kind = self.kinds.get(site, "heads")
        if kind not in KINDS:
            raise invalid(f"kinds[{shown(site)}]", f"be one of {', '.join(KINDS)}", kind)
        return kind

    def _matrix(self, site: str) -> Tensor:
        """Return a site's interactions. Raises `InvalidInputError` unless they are finite, for all of its units."""
        matrix = own_tensor(f"interactions[{shown(site)}]", self.interactions[site])
        if site not in self:
            raise invalid("interactions", "name sites that have scores", site)
        count = self[site].numel()
        if matrix.shape != (count, count) or not bool(torch.isfinite(matrix).all()):
            raise invalid(f"interactions[{shown(site)}]", f"be finite numbers [{count}, {count}]", tuple(matrix.shape))
        return matrix


@dataclass(frozen=True, eq=False)
class PresentScores(_Scores):
    """Importance of the units that are there now: site → float64 vector `[units]`, higher = keep, present numbering.

    What a scorer finds, and what pruners select by. Sites without any unit left are not in it.
    """

    _may_be_empty = True

    @classmethod
    def of(cls, found: Mapping[str, Tensor], sites: Mapping[str, Site], scorer: str = "") -> PresentScores:
        """Take what a scorer returned: `[units]` a site, or a matrix `[units, units]` of interactions."""
        rows = {name: torch.as_tensor(found[name], dtype=torch.float64).detach().cpu() for name in sites}
        there = {name: row for name, row in rows.items() if sites[name].num_units}
        values = {name: row.diagonal() if row.ndim == 2 else row for name, row in there.items()}
        matrices = {name: row for name, row in there.items() if row.ndim == 2}
        kinds = {name: sites[name].kind for name in there}
        return cls(values, {name: sites[name].num_groups for name in there}, scorer, matrices, kinds)

    def original(self, sites: Mapping[str, Site]) -> Scores:
        """Return the scores in the numbering of the original model, over all `sites`: -inf for what is gone."""
        values, interactions = {}, {}
        for name, site in sites.items():
            count, units = site.original_num_units, torch.tensor(site.units, dtype=torch.int64)
            values[name] = torch.full((count,), -math.inf, dtype=torch.float64)
            if name in self:
                values[name][units] = self[name]
            if name in self.interactions:
                interactions[name] = torch.zeros(count, count, dtype=torch.float64)
                interactions[name][units[:, None], units] = self.interactions[name]
        groups = {name: site.original_num_groups for name, site in sites.items()}
        return Scores(values, groups, self.scorer, interactions, {name: site.kind for name, site in sites.items()})


@dataclass(frozen=True, eq=False)
class Scores(_Scores, Saved):
    """Importance of every unit: site → float64 vector `[units of the original model]`, higher = keep.

    Minus infinity stands for a unit that an earlier removal took. `num_groups`, `scorer` and `interactions`: see
    `PresentScores`, in original numbering. `num_texts` is how many texts were scored, None where that is not known;
    `agreement` is what `stop="auto"` found out (see `secateur.texts.stopping.Settling`), None elsewhere. `staying` has
    units that stay whatever their score, by site; it is about one selection, and not saved.

    Raises `InvalidInputError` for an empty mapping and for NaN or +inf, naming the site, for interactions that are not
    finite or of another shape, and for a site whose groups have unlike numbers of units left.
    """

    num_texts: int | None = None
    agreement: float | None = None
    staying: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = self.num_texts
        if texts is not None and (isinstance(texts, bool) or not isinstance(texts, int) or texts < 0):
            raise invalid("num_texts", "be a whole number from 0", texts)
        if self.agreement is not None and not (isinstance(self.agreement, int | float) and 0 <= self.agreement <= 1):
            raise invalid("agreement", "be in [0, 1]", self.agreement)
        known = isinstance(self.staying, Mapping)
        if not known or not all(isinstance(x, list) and {*map(type, x)} <= {int} for x in self.staying.values()):
            raise invalid("staying", "map sites to lists of the units that stay", self.staying)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and self.to_json() == other.to_json()

    def __repr__(self) -> str:
        counts = {kind: sum(self[site].numel() for site in self if self.kinds[site] == kind) for kind in KINDS}
        said = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        by = f" by {self.scorer}" if self.scorer else ""
        texts = "" if self.num_texts is None else f", {self.num_texts:,} texts"
        return f"Scores({said} at {len(self)} {'site' if len(self) == 1 else 'sites'}{by}{texts})"

    def _repr_html_(self) -> str:
        """Return the grid of units that a notebook shows."""
        return grid_html(repr(self), None, self)

    def plot(self) -> Figure:
        """Draw the grid, units by site, the darker the higher the score, with a scale for each kind of units.

        `scores.plot().savefig("scores.pdf")` writes it. Raises `InvalidInputError` where matplotlib is not installed:
        `pip install 'secateur[plots]'`.
        """
        from secateur.units.picture import scores_figure

        return scores_figure(self, self.kinds)

    __hash__ = None  # type: ignore[assignment]  # as with every mapping that holds tensors

    def only(self, sites: Collection[str]) -> Scores:
        """Return the scores of these sites alone. Raises `InvalidInputError` where there is none."""
        names = ("values_by_site", "num_groups", "interactions", "kinds")
        parts: dict[str, Any] = {name: {s: x for s, x in getattr(self, name).items() if s in sites} for name in names}
        return replace(self, **parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a removed unit's -inf becomes null."""
        data = {
            "kind": "scores",
            "scorer": self.scorer,
            "scores": {s: [None if x == -math.inf else x for x in v.tolist()] for s, v in self.items()},
            "num_groups": dict(self.num_groups),
        }
        if others := {site: kind for site, kind in self.kinds.items() if kind != "heads"}:
            data["kinds"] = others
        if self.interactions:
            data["interactions"] = {site: matrix.tolist() for site, matrix in self.interactions.items()}
        known = {"num_texts": self.num_texts, "agreement": self.agreement}
        return data | {name: value for name, value in known.items() if value is not None}

    @classmethod
    def from_json(cls, data: Any) -> Scores:
        """Rebuild from `to_json`'s data. Raises `InvalidInputError` where the data has another form."""
        rows = json_rows(data, "scores", "scores")
        values = {}
        for site, row in rows.items():
            if not all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in row):
                raise invalid(f"scores[{shown(site)}]", "be a list of numbers or null", row)
            values[site] = own_tensor(f"scores[{shown(site)}]", [-math.inf if x is None else x for x in row])
        groups = data.get("num_groups", {})
        if not isinstance(groups, dict) or not all(
            isinstance(n, int) and not isinstance(n, bool) for n in groups.values()
        ):
            raise invalid("num_groups", "map each site to a whole number", groups)
        try:
            interactions = {
                site: torch.tensor(matrix, dtype=torch.float64) for site, matrix in data.get("interactions", {}).items()
            }
        except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
            raise invalid("interactions", "map each site to rows of numbers", data["interactions"]) from None
        return cls(
            values,
            groups,
            str(data.get("scorer", "")),
            interactions,
            data.get("kinds", {}),
            data.get("num_texts"),
            data.get("agreement"),
        )


def _finite(site: str, vector: Any) -> Tensor:
    """Return a vector of our own. Raises `InvalidInputError` unless it holds a number, or -inf, for each unit."""
    tensor = own_tensor(f"scores[{shown(site)}]", vector)
    if tensor.ndim != 1 or not tensor.numel():
        raise invalid(f"scores[{shown(site)}]", "be a vector with one number for each unit", tuple(tensor.shape))
    if bool(torch.isnan(tensor).any()) or bool((tensor == math.inf).any()):
        raise invalid(f"scores[{shown(site)}]", "be finite", tensor.tolist())
    return tensor
