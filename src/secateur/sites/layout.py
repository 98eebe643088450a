"""What each unit of a site owns, as plain data that a checkpoint can carry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import invalid

NOBODY = -1  # an index that no single head owns: shared by all of them, or used by none
# Far beyond any model, so that a few bytes of a damaged recipe cannot ask for all memory.
_MOST_HEADS = 10_000
LONGEST_AXIS = 1_000_000
_MOST_OWNERS = 10_000_000  # of a recipe, in all runs that differ


@dataclass(frozen=True)
class Slice:
    """One axis of one parameter, divided among units.

    `owners` has an entry for each index along `axis`: a unit's number, or `NOBODY`. `role` says for what the units use
    it. Of heads "query" and "output" count query heads, "key" and "value" count key-value heads, and "head" is anything
    that a query head computes from, where query, key and value cannot be told apart.
    """

    parameter: str
    axis: int
    role: str
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Site(ABC):
    """What holds units of one `kind`: where it is in the base model, how many there are, and what each of them owns.

    `name`, `output` (the projection that writes into the residual stream) and the parameters of `slices` are paths in
    the base model. `attributes` maps the path of a module's attribute to what it counts. `units` are the original
    indices of the `num_units` units that are there now, out of `original_num_units`. Each gives the output projection
    `width` numbers. Units of a group share weights: `num_groups` are there now, out of `original_num_groups`, all of
    one size, which is 1 where nothing is shared.
    """

    kind: ClassVar[str]

    name: str
    num_units: int
    num_groups: int
    width: int
    slices: tuple[Slice, ...]
    attributes: dict[str, str]
    output: str
    units: tuple[int, ...]
    original_num_units: int
    original_num_groups: int

    @property
    def group_size(self) -> int:
        """Units of each group."""
        return self.num_units // self.num_groups if self.num_groups else 1

    def slices_of(self, role: str) -> list[Slice]:
        """Return the slices with this role."""
        return [piece for piece in self.slices if piece.role == role]

    def kept_groups(self, kept: Tensor) -> Tensor:
        """Return which groups still have a unit in `kept` (bool `[units]`): bool `[groups]`."""
        return kept.view(self.num_groups, -1).any(dim=1) if self.num_units else kept

    def kept_indices(self, kept: Tensor) -> dict[tuple[str, int], Tensor]:
        """Return, for each (parameter, axis) that units divide, the indices that stay.

        An index goes if some unit uses it and no kept unit does.
        """
        stays: dict[tuple[str, int], Tensor] = {}
        for piece in self.slices:
            owners = torch.tensor(piece.owners)
            used = owners != NOBODY
            wanted = used & self.kept_owners(piece.role, kept)[owners.clamp(min=0)]
            before = stays.get((piece.parameter, piece.axis))
            # 0 = used by dropped units only, 1 = used by nobody so far, 2 = used by a kept unit
            state = torch.where(wanted, 2, torch.where(used, 0, 1))
            stays[piece.parameter, piece.axis] = state if before is None else _merge(before, state)
        return {key: (state > 0).nonzero().flatten() for key, state in stays.items()}

    def kept_slices(self, kept: Tensor) -> tuple[Slice, ...]:
        """Return what the units in `kept` (bool `[units]`) own once the others are gone, by their numbers then."""
        if not kept.any():
            return ()
        stays = self.kept_indices(kept)
        slices = []
        for piece in self.slices:
            owners_left = self.kept_owners(piece.role, kept).nonzero().flatten().tolist()
            numbers = {old: new for new, old in enumerate(owners_left)}
            indices = stays[piece.parameter, piece.axis].tolist()
            slices.append(replace(piece, owners=tuple(numbers.get(piece.owners[i], NOBODY) for i in indices)))
        return tuple(slices)

    @abstractmethod
    def kept_owners(self, role: str, kept: Tensor) -> Tensor:
        """Return which owners in slices of `role` are left with the units in `kept` (bool `[units]`)."""

    @abstractmethod
    def counts(self, kept: Tensor) -> dict[str, int]:
        """Return what each kind of attribute counts once only the units in `kept` (bool `[units]`) are left."""

    @abstractmethod
    def check(self, kept: Tensor) -> None:
        """Raise `InvalidInputError` where the module could not run with the units in `kept` (bool `[units]`) alone."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the unpruned site's layout, relative to the block that holds it: equal for all blocks of one kind."""

    def relative(self) -> dict[str, Any]:
        """Return where the site's parts are, as `to_json` has it: by paths below the block, the longest path above."""
        block = self._block()
        return {
            "site": _below(self.name, block),
            "output": _below(self.output, block),
            "slices": [[_below(s.parameter, block), s.axis, s.role, _to_runs(s.owners)] for s in self.slices],
            "attributes": {_below(path, block): quantity for path, quantity in self.attributes.items()},
        }

    def _block(self) -> str:
        """Return the longest module path above the site, its output projection, and all that its units own."""
        paths = [self.name, self.output, *(piece.parameter for piece in self.slices), *self.attributes]
        common = []
        for parts in zip(*(path.split(".") for path in paths), strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)


def absolute(name: str, data: dict[str, Any], limits: dict[str, int], runs: Runs) -> dict[str, Any]:
    """Return what `Site.relative` gave, as arguments of the site `name`; `limits` has how many owners a role has.

    Raises `KeyError`, `TypeError` or `ValueError` for other data.
    """
    suffix = data["site"]
    if not (name == suffix or not suffix or name.endswith("." + suffix)):
        raise ValueError(f"site {name} does not end in {suffix}")
    block = name[: len(name) - len(suffix)].rstrip(".")
    slices = [
        Slice(_above(parameter, block), whole_number(axis, 0, 9), role, runs.owners(text, limits[role]))
        for parameter, axis, role, text in data["slices"]
    ]
    return {
        "slices": tuple(slices),
        "attributes": {_above(path, block): quantity for path, quantity in data["attributes"].items()},
        "output": _above(data["output"], block),
    }


@dataclass(frozen=True)
class AttentionSite(Site):
    """An attention block, whose units are its query heads; those that read the same key-value head are a group.

    `attributes` count heads, key_value_heads, group (heads for each key-value head) or width, that of all heads.
    """

    kind = "heads"

    def kept_owners(self, role: str, kept: Tensor) -> Tensor:
        """Return which owners are left: key-value heads that a kept query head still reads, or query heads."""
        return self.kept_groups(kept) if role in ("key", "value") else kept

    def counts(self, kept: Tensor) -> dict[str, int]:
        """Return what each kind of attribute counts once only the heads in `kept` (bool `[heads]`) are left."""
        heads, kv_heads = int(kept.sum()), int(self.kept_groups(kept).sum())
        group = heads // kv_heads if kv_heads else self.group_size
        return {"heads": heads, "key_value_heads": kv_heads, "group": group, "width": heads * self.width}

    def check(self, kept: Tensor) -> None:
        """Raise `InvalidInputError` where grouped query heads would be left in unequal groups."""
        if self.group_size == 1:
            return
        sizes = kept.view(self.num_groups, self.group_size).sum(dim=1).tolist()
        if len(set(sizes) - {0}) > 1:
            raise invalid(
                f"mask[{self.name!r}]",
                f"drop whole groups of {self.group_size} query heads, or as many heads in every group that stays",
                sizes,
                "`select` makes such masks",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the layout relative to the attention block, equal for all blocks of one kind."""
        return {
            "num_heads": self.original_num_units,
            "num_key_value_heads": self.original_num_groups,
            "head_dim": self.width,
            **self.relative(),
        }

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any], runs: Runs | None = None) -> AttentionSite:
        """Rebuild the unpruned site `name`. Raises `KeyError`, `TypeError` or `ValueError` for other data.

        `runs` reads the owners of all sites of a recipe.
        """
        runs = Runs() if runs is None else runs
        heads, kv_heads = (whole_number(data[name], 1, _MOST_HEADS) for name in ("num_heads", "num_key_value_heads"))
        if heads % kv_heads:
            raise ValueError(f"{heads} heads do not divide among {kv_heads} key-value heads")
        limits = {"query": heads, "head": heads, "output": heads, "key": kv_heads, "value": kv_heads}
        parts = absolute(name, data, limits, runs)
        if not set(parts["attributes"].values()) <= {"heads", "key_value_heads", "group", "width"}:
            raise ValueError(f"unknown quantity among {sorted(set(parts['attributes'].values()))}")
        return cls(
            name=name,
            num_units=heads,
            num_groups=kv_heads,
            width=whole_number(data["head_dim"], 1, LONGEST_AXIS),
            units=runs.units(heads),
            original_num_units=heads,
            original_num_groups=kv_heads,
            **parts,
        )


def _merge(one: Tensor, other: Tensor) -> Tensor:
    """Join two views of one axis (a fused q, k, v weight): a kept user wins, then a dropped one, then none."""
    dropped = (one == 0) | (other == 0)
    return torch.where((one == 2) | (other == 2), 2, torch.where(dropped, 0, 1))


def _to_runs(owners: tuple[int, ...]) -> str:
    """Write `(0, 0, 1, 1)` as "0x2 1x2", and `(0, 1, 2)`, of which each owns one index, as "0:3"; `NOBODY` is "-"."""
    runs = [(owner, len(list(run))) for owner, run in groupby(owners)]
    texts: list[str] = []
    place = 0
    while place < len(runs):
        owner, length = runs[place]
        end = place + 1
        while end < len(runs) and length == 1 and owner != NOBODY and runs[end] == (owner + end - place, 1):
            end += 1
        texts.append(
            f"{owner}:{owner + end - place}" if end > place + 1 else f"{'-' if owner == NOBODY else owner}x{length}"
        )
        place = end
    return " ".join(texts)


class Runs:
    """Reads the owners of all sites of one recipe: what is written alike is held once, and all of it is bounded.

    A recipe is read before the shapes of the model are there to compare it with, and a short one could ask for more
    than there is memory.
    """

    def __init__(self) -> None:
        self._read: dict[tuple[str, int], tuple[int, ...]] = {}
        self._units: dict[int, tuple[int, ...]] = {}
        self._left = _MOST_OWNERS

    def units(self, count: int) -> tuple[int, ...]:
        """Return the numbers of `count` units."""
        if count not in self._units:
            self._take(count)
            self._units[count] = tuple(range(count))
        return self._units[count]

    def owners(self, text: str, limit: int) -> tuple[int, ...]:
        """Return the owners, below `limit`, that "0x2 1:3" stands for: (0, 0, 1, 2). Raises `ValueError` for others."""
        if (text, limit) not in self._read:
            owners: list[int] = []
            for run in text.split():
                owner, mark, length = run.partition(":" if ":" in run else "x")
                first = NOBODY if owner == "-" else int(owner)
                count = int(length) - first if mark == ":" else int(length)
                last = first + count - 1 if mark == ":" else first
                lowest = 0 if mark == ":" else NOBODY
                if not (lowest <= first <= last < limit) or not 0 < count <= LONGEST_AXIS - len(owners):
                    raise ValueError(f"impossible run {run!r} among {limit} units")
                self._take(count)
                owners += range(first, last + 1) if mark == ":" else [first] * count
            self._read[text, limit] = tuple(owners)
        return self._read[text, limit]

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"its runs have more than {_MOST_OWNERS} entries")


def whole_number(value: Any, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`. Raises `ValueError` for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def _below(path: str, block: str) -> str:
    return path[len(block) :].lstrip(".") if block else path


def _above(path: str, block: str) -> str:
    if path and not all(path.split(".")):
        raise ValueError(f"{path!r} is no path of a module")
    return ".".join(part for part in (block, path) if part)
