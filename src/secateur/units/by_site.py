"""What scores and masks have in common: a vector for each site, read like a mapping, and files of plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import InvalidInputError, invalid
from secateur.support.checks import check_path
from secateur.support.files import read_json, write_text

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class BySite(Mapping[str, Tensor]):
    """A mapping from sites to vectors."""

    values_by_site: dict[str, Tensor]

    def __getitem__(self, site: str) -> Tensor:
        return self.values_by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_site)

    def __len__(self) -> int:
        return len(self.values_by_site)


class Saved:
    """Mixed into what saves to and loads from a JSON file."""

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


def own_tensor(name: str, values: Any, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """Return the values as a tensor of our own: what a caller writes into theirs later has not been checked."""
    try:
        return torch.as_tensor(values, dtype=dtype).detach().cpu().clone()
    except (TypeError, ValueError, OverflowError, RuntimeError):  # a text, rows of unlike lengths, 300 digits
        raise invalid(name, "hold numbers, each as float64 can hold it" if dtype else "hold booleans", values) from None


def json_rows(data: Any, kind: str, key: str) -> dict[str, list[Any]]:
    """Check the outer form that all files share and return the rows by site."""
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise InvalidInputError(f'this is no {kind} file: it must be a JSON object with "kind": "{kind}"')
    rows = data.get(key)
    if not isinstance(rows, dict) or not all(isinstance(row, list) for row in rows.values()):
        raise invalid(key, "map each site to a list", rows)
    return rows
