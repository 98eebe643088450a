"""The two values that join the steps: `HeadScores` (how important) and `HeadMask` (what stays).

Both map an attention site's name to one vector with an entry for each head, in the numbering of the original,
unpruned model. A head that an earlier pruning removed has the score minus infinity and the mask False.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import InvalidInputError, invalid, shown
from secateur.support.checks import check_mapping, check_path, check_whole
from secateur.support.files import read_json, write_text

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class _BySite(Mapping[str, Tensor]):
    """A mapping from sites to vectors that saves to and loads from JSON."""

    values_by_site: dict[str, Tensor]

    def __getitem__(self, site: str) -> Tensor:
        return self.values_by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_site)

    def __len__(self) -> int:
        return len(self.values_by_site)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from `to_json`'s data. Raises `InvalidInputError` where the data has another form."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(check_path("path", path), json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote."""
        return cls.from_json(read_json(check_path("path", path)))


@dataclass(frozen=True, eq=False)
class HeadScores(_BySite):
    """Importance of every head: site name → float64 vector `[heads]`, higher = keep, -inf = already removed.

    `key_value_heads` holds, for each site, how many key-value heads its query heads share (equal to the number of
    heads where nothing is shared). `scorer` names the criterion. `interactions` holds, for the sites of a criterion
    that knows them, a symmetric float64 matrix `[heads, heads]`: its sum over the rows and columns of several heads is
    what removing all of them costs, 0 for heads already removed; `select_heads` takes it into account. `num_texts` is
    how many texts were scored, None where that is not known; `agreement` is what `stop="auto"` found out (see
    `secateur.texts.stopping.Settling`), None elsewhere.

    Raises `InvalidInputError` for an empty mapping and for NaN or +inf, naming the site, and for interactions that are
    not finite or of another shape, and for a site whose key-value groups have unlike numbers of heads left.
    """

    key_value_heads: dict[str, int] = field(default_factory=dict)
    scorer: str = ""
    interactions: dict[str, Tensor] = field(default_factory=dict)
    num_texts: int | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        check_mapping("scores", self.values_by_site, "map at least one attention site to a vector")
        for name in ("key_value_heads", "interactions"):
            if not isinstance(getattr(self, name), Mapping):
                raise invalid(name, "map sites to what is known of them", getattr(self, name))
        if not isinstance(self.scorer, str):
            raise invalid("scorer", "be a text", self.scorer)
        clean = {}
        for site, vector in self.values_by_site.items():
            tensor = _vector(f"scores[{shown(site)}]", vector)
            if tensor.ndim != 1 or not tensor.numel():
                raise invalid(
                    f"scores[{shown(site)}]", "be a vector with one number for each head", tuple(tensor.shape)
                )
            if bool(torch.isnan(tensor).any()) or bool((tensor == math.inf).any()):
                raise invalid(f"scores[{shown(site)}]", "be finite", tensor.tolist())
            clean[site] = tensor
        kv_heads = {site: self.key_value_heads.get(site, v.numel()) for site, v in clean.items()}
        for site, count in kv_heads.items():
            check_whole(f"key_value_heads[{shown(site)}]", count)
            if clean[site].numel() % count:
                raise invalid(
                    f"key_value_heads[{shown(site)}]", f"divide the site's {clean[site].numel()} heads evenly", count
                )
        for site, vector in clean.items():
            # A removal leaves equal groups (see `remove_heads_`), so other scores are of no model.
            sizes = (vector > -math.inf).view(kv_heads[site], -1).sum(dim=1).tolist()
            if len(set(sizes) - {0}) > 1:
                raise invalid(f"scores[{shown(site)}]", "have as many heads in every group that is there", sizes)
        object.__setattr__(self, "values_by_site", clean)
        object.__setattr__(self, "key_value_heads", kv_heads)
        matrices = {site: _vector(f"interactions[{shown(site)}]", m) for site, m in self.interactions.items()}
        for site, matrix in matrices.items():
            if site not in clean:
                raise invalid("interactions", "name sites that have scores", site)
            count = clean[site].numel()
            if matrix.shape != (count, count) or not bool(torch.isfinite(matrix).all()):
                raise invalid(
                    f"interactions[{shown(site)}]", f"be finite numbers [{count}, {count}]", tuple(matrix.shape)
                )
        object.__setattr__(self, "interactions", matrices)
        texts = self.num_texts
        if texts is not None and (isinstance(texts, bool) or not isinstance(texts, int) or texts < 0):
            raise invalid("num_texts", "be a whole number from 0", texts)
        if self.agreement is not None and not (isinstance(self.agreement, int | float) and 0 <= self.agreement <= 1):
            raise invalid("agreement", "be in [0, 1]", self.agreement)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadScores) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # as with every mapping that holds tensors

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a removed head's -inf becomes null."""
        data = {
            "kind": "head_scores",
            "scorer": self.scorer,
            "scores": {s: [None if x == -math.inf else x for x in v.tolist()] for s, v in self.items()},
            "key_value_heads": dict(self.key_value_heads),
        }
        if self.interactions:
            data["interactions"] = {site: matrix.tolist() for site, matrix in self.interactions.items()}
        known = {"num_texts": self.num_texts, "agreement": self.agreement}
        return data | {name: value for name, value in known.items() if value is not None}

    @classmethod
    def from_json(cls, data: Any) -> HeadScores:
        """Rebuild from `to_json`'s data. Raises `InvalidInputError` where the data has another form."""
        rows = _rows(data, "head_scores", "scores")
        values = {}
        for site, row in rows.items():
            if not all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in row):
                raise invalid(f"scores[{shown(site)}]", "be a list of numbers or null", row)
            values[site] = _vector(f"scores[{shown(site)}]", [-math.inf if x is None else x for x in row])
        kv_heads = data.get("key_value_heads", {})
        if not isinstance(kv_heads, dict) or not all(
            isinstance(n, int) and not isinstance(n, bool) for n in kv_heads.values()
        ):
            raise invalid("key_value_heads", "map each site to a whole number", kv_heads)
        try:
            interactions = {
                site: torch.tensor(matrix, dtype=torch.float64) for site, matrix in data.get("interactions", {}).items()
            }
        except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
            raise invalid("interactions", "map each site to rows of numbers", data["interactions"]) from None
        return cls(
            values, kv_heads, str(data.get("scorer", "")), interactions, data.get("num_texts"), data.get("agreement")
        )


@dataclass(frozen=True, eq=False)
class HeadMask(_BySite):
    """Which heads stay: site name → bool vector `[heads]`, True = kept, original numbering."""

    def __post_init__(self) -> None:
        check_mapping("mask", self.values_by_site, "map at least one attention site to a vector")
        clean = {}
        for site, vector in self.values_by_site.items():
            tensor = _vector(f"mask[{shown(site)}]", vector, None)
            if tensor.dtype != torch.bool or tensor.ndim != 1 or not tensor.numel():
                raise invalid(
                    f"mask[{shown(site)}]", "be a vector of booleans, one for each head (True = kept)", vector
                )
            clean[site] = tensor
        object.__setattr__(self, "values_by_site", clean)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMask) and self.kept_heads == other.kept_heads and self.shape == other.shape

    def __hash__(self) -> int:
        return hash(json.dumps(self.kept_heads, sort_keys=True))

    @property
    def kept_heads(self) -> dict[str, list[int]]:
        """Site → the indices of the heads that stay."""
        return {site: vector.nonzero().flatten().tolist() for site, vector in self.items()}

    @property
    def shape(self) -> dict[str, int]:
        """Site → its number of heads in the original model."""
        return {site: vector.numel() for site, vector in self.items()}

    @property
    def num_heads(self) -> int:
        """Heads of the original model, over all sites."""
        return sum(self.shape.values())

    @property
    def num_kept(self) -> int:
        """Heads that stay, over all sites."""
        return sum(int(v.sum()) for v in self.values())

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the original heads that this mask removes."""
        return 1 - self.num_kept / self.num_heads

    def __str__(self) -> str:
        return f"kept {self.num_kept} of {self.num_heads} heads (pruning ratio {self.pruning_ratio:.2f})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"kind": "head_mask", "mask": {site: vector.tolist() for site, vector in self.items()}}

    @classmethod
    def from_json(cls, data: Any) -> HeadMask:
        """Rebuild from `to_json`'s data. Raises `InvalidInputError` where the data has another form."""
        rows = _rows(data, "head_mask", "mask")
        for site, row in rows.items():
            if not all(isinstance(x, bool) for x in row):
                raise invalid(f"mask[{shown(site)}]", "be a list of true or false", row)
        return cls({site: torch.tensor(row, dtype=torch.bool) for site, row in rows.items()})


def _vector(name: str, values: Any, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Return the values as a tensor of our own: what a caller writes into theirs later has not been checked."""
    try:
        return torch.as_tensor(values, dtype=dtype).detach().cpu().clone()
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a text, rows of unlike lengths, 300 digits
        raise invalid(name, "hold numbers, each as float64 can hold it" if dtype else "hold booleans", values) from None


def _rows(data: Any, kind: str, key: str) -> dict[str, list[Any]]:
    """Check the outer form that both files share and return the rows by site."""
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise InvalidInputError(f'this is no {kind} file: it must be a JSON object with "kind": "{kind}"')
    rows = data.get(key)
    if not isinstance(rows, dict) or not all(isinstance(row, list) for row in rows.values()):
        raise invalid(key, "map each site to a list", rows)
    return rows
