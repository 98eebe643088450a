"""How much sooner a model is done with fewer units at a site: measured on copies, in turn, by kind of site."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor, nn

from secateur.errors import invalid
from secateur.measuring.cost import forward_pass
from secateur.measuring.timing import Clock, quartiles, time_in_turn
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.base_model import base_of
from secateur.models.state import evaluation_mode
from secateur.removal.remove import remove_
from secateur.settings import Shape, parse_shape
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.support.checks import is_number
from secateur.support.files import read_json
from secateur.support.interrupts import interruptible
from secateur.units.masks import Mask, original_vector

PYTORCH = "pytorch"
RunOf = Callable[[Any, int, int], Callable[[], Any]]
_SHORTEST, _LONGEST = 1e-9, 1e9  # seconds of a pass
MOST_LEVELS = 12
"""Numbers of units that are timed for one kind of site; the others lie on straight lines between them."""


@dataclass(frozen=True)
class Level:
    """A kind of site with `units` units left: the multiply-accumulates that one site saves, and what the model takes.

    `seconds` are those of the whole model with every site of the kind cut down to this, round by round.
    """

    units: int
    saved_macs: float
    seconds: list[float]


@dataclass(frozen=True)
class Kind:
    """Sites of one build that do the same work, and what was measured of them, from all units down to the fewest."""

    sites: tuple[str, ...]
    levels: tuple[Level, ...]

    def saved(self, saved_macs: float) -> float:
        """Return the share of the dense model's time that one site saves, by the multiply-accumulates that it saves.

        Medians over rounds, made not to fall as more is saved (isotonic regression): a search for the first level that
        is fast enough would otherwise find the luckiest.
        """
        return float(np.interp(saved_macs, [level.saved_macs for level in self.levels], self._shares)) / len(self.sites)

    @cached_property
    def _shares(self) -> Any:
        whole = self.levels[0].seconds
        raw = [quartiles([1 - a / b for a, b in zip(level.seconds, whole, strict=True)])[1] for level in self.levels]
        return isotonic_regression(raw, sample_weight=[1e6] + [1] * (len(raw) - 1), y_min=0)

    def saved_by_layer(self, macs: float) -> float:
        """Return the share that one layer of a list saves, by its multiply-accumulates: as the measured ones do."""
        measured = self.levels[-1].saved_macs
        return self.saved(measured) * macs / measured if measured else 0.0

    def rounded(self, units: int) -> int:
        """Return the largest number of units, `units` or more, that was faster in three of four rounds."""
        by_units = {level.units: level.seconds for level in reversed(self.levels)}
        here = by_units.get(units)
        if here is None:
            return units
        faster = [
            more
            for more, seconds in by_units.items()
            if more > units and quartiles([a / b for a, b in zip(seconds, here, strict=True)])[2] <= 1
        ]
        return max(faster, default=units)


@dataclass(frozen=True)
class LatencyTable:
    """The kinds of a model's sites at one shape, and what ran them."""

    shape: Shape
    kinds: tuple[Kind, ...]
    runtime: str = PYTORCH

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        kinds = [{"sites": list(k.sites), "levels": [asdict(level) for level in k.levels]} for k in self.kinds]
        return {"runtime": self.runtime, "shape": str(self.shape), "kinds": kinds}

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `secateur bench --table` wrote. Raises `InvalidInputError` for any other file."""
        data = read_json(path)
        if not _is_table(data):
            raise invalid("latency_table", "be what `secateur bench --table` writes", str(path), "measure it again")
        kinds = [
            Kind(tuple(kind["sites"]), tuple(Level(**level) for level in kind["levels"])) for kind in data["kinds"]
        ]
        return cls(parse_shape(data["shape"]), tuple(kinds), data["runtime"])

    def check_fits(self, sites: Mapping[str, Site], shape: Shape) -> None:
        """Raise `InvalidInputError` unless it was measured at this shape, of a model with these sites."""
        if self.shape != shape:
            raise invalid("budget", f"be of {self.shape}, as the latency table is", str(shape))
        levels = {name: kind.levels[0].units for kind in self.kinds for name in kind.sites}
        for name, site in sites.items():
            if site.num_units and levels.get(name) != site.num_units:
                rule = f"be of this model, whose site {name} has {site.num_units} {site.kind}"
                raise invalid(
                    "latency_table", rule, f"{levels.get(name, 0)}", "measure one of it: secateur bench --table"
                )


def _is_table(data: Any) -> bool:
    """Are these the values that a measurement gives?"""
    return (
        isinstance(data, dict)
        and all(isinstance(data.get(name), str) for name in ("runtime", "shape"))
        and isinstance(data.get("kinds"), list)
        and bool(data["kinds"])
        and all(isinstance(kind, dict) and _is_kind(**kind) for kind in data["kinds"])
    )


def _is_kind(sites: Any = None, levels: Any = None, **others: Any) -> bool:
    """Are these sites, and what was timed of them, in order and in as many rounds?"""
    return (
        not others and isinstance(sites, list) and bool(sites) and all(isinstance(name, str) for name in sites)
        and isinstance(levels, list) and bool(levels)
        and all(isinstance(level, dict) and _is_level(**level) for level in levels)
        and len({len(level["seconds"]) for level in levels}) == 1
        and all(one["saved_macs"] < more["saved_macs"] for one, more in itertools.pairwise(levels))
    )  # fmt: skip


def _is_level(units: Any = None, saved_macs: Any = None, seconds: Any = None, **others: Any) -> bool:
    return (
        not others and isinstance(units, int) and is_number(units, least=0) and is_number(saved_macs, least=0)
        and isinstance(seconds, list) and bool(seconds) and all(map(_is_time, seconds))
    )  # fmt: skip


def _is_time(seconds: Any) -> bool:
    return is_number(seconds, least=_SHORTEST) and seconds <= _LONGEST


@interruptible
def measure_latency(
    model: nn.Module,
    costs: UnitCosts,
    shape: Shape,
    rounds: int = 8,
    clock: Clock = "wall",
    progress: bool = False,
    run_of: RunOf = forward_pass,
    runtime: str = PYTORCH,
) -> LatencyTable:
    """Time the base model whole, and with the sites of one kind at a time cut to fewer and fewer units.

    `run_of(model, batch, length)` makes a call that runs a model, in another runtime than PyTorch where it says so.

    Of a list of layers, without half of them: what one layer saves, with all that is in it, is its part of that.

    What units do not own is shared with the copies that are cut, so they take the memory of the attention's weights.
    """
    base = base_of(model)
    groups: dict[Any, list[Site]] = {}
    for name, site in costs.sites.items():
        if site.num_units:
            work = costs.saved_macs(name, torch.zeros(site.num_units, dtype=torch.bool))
            key = repr((site.to_json(), site.num_units, site.num_groups, work))
            groups.setdefault(key, []).append(site)
    runs = {(-1, 0): run_of(base, *shape)}
    levels: dict[int, list[tuple[int, float]]] = {}
    with torch.no_grad(), ExitStack() as modes:
        modes.enter_context(evaluation_mode(base))
        for number, sites in enumerate(groups.values()):
            levels[number] = [(sites[0].num_units, 0.0)]
            for kept in _cuts(sites[0], costs):
                smaller = shared_copy(base, costs.sites)
                cut = Mask({site.name: original_vector(site, kept) for site in sites})
                remove_(smaller, cut, sites=costs.sites)
                modes.enter_context(evaluation_mode(smaller))
                runs[number, len(levels[number])] = run_of(smaller, *shape)
                levels[number].append((int(kept.sum()), costs.saved_macs(sites[0].name, kept)))
        names = {str(key): run for key, run in runs.items()}
        seconds = time_in_turn(names, rounds, min_seconds=0.05, clock=clock, progress=progress)
    kinds = []
    for number, sites in enumerate(groups.values()):
        measured = [
            Level(units, macs, seconds[str((number, i) if i else (-1, 0))])
            for i, (units, macs) in enumerate(levels[number])
        ]
        kinds.append(Kind(tuple(site.name for site in sites), tuple(measured)))
    return LatencyTable(shape, tuple(kinds), runtime)


def shared_copy(base: nn.Module, sites: Any) -> Any:
    """Return a copy that may lose units while `base` keeps them; parameters that no unit owns are the same objects."""
    owned = {piece.parameter for site in sites.values() for piece in site.slices}
    shared = {id(p): p for name, p in base.named_parameters(remove_duplicate=False) if name not in owned}
    return copy.deepcopy(base, shared)


def _cuts(site: Site, costs: UnitCosts) -> list[Tensor]:
    """Return the masks of the units there now that are timed, each saving more.

    Of layers half go at once: they stand out of the noise so, and what lies around them still weighs as it does. The
    first ones stay, as a shorter model has them.
    """
    if isinstance(site, LayerSite):
        left = site.num_units - site.num_units // 2
        return [torch.arange(site.num_units) < left] if left < site.num_units else []
    return _thinned(list(_fewer(site, costs)))


def _fewer(site: Site, costs: UnitCosts) -> Iterator[Tensor]:
    """Yield masks of the units there now, each saving more: fewer groups, and fewer units in each."""
    shapes = itertools.product(range(1, site.num_groups + 1), range(1, site.group_size + 1))
    masks = {}
    for groups, per_group in shapes:
        kept = torch.zeros(site.num_groups, site.group_size, dtype=torch.bool)
        kept[:groups, :per_group] = True
        masks[costs.saved_macs(site.name, kept.flatten())] = kept.flatten()
    yield from (masks[saved] for saved in sorted(masks) if saved > 0)


def _thinned(masks: list[Tensor]) -> list[Tensor]:
    """Return some of the masks, evenly spread, the last one among them."""
    if len(masks) <= MOST_LEVELS:
        return masks
    return [masks[round(i * (len(masks) - 1) / (MOST_LEVELS - 1))] for i in range(MOST_LEVELS)]
