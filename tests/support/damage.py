"""Damaged copies of JSON data, for tests that ask what is refused: a few places changed, dropped, added or renamed."""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 0.5, 10**6, 10**30, 10**400, 1e999, -1e999, math.nan, "", "x", "1x2", "-x3",
    "0x1000000 " * 3, "9" * 5000, "a.b", "../../x", "__class__", "<script>alert(1)</script>", "\ud800", "\0", [], {},
    [0], [[0]], ["x"], [None], {"a": 1}, {"0": [0]},
]  # fmt: skip
"""Values of another type, out of range, empty, too large, and with a meaning elsewhere."""


def damaged(documents: list[Any], extra: list[Any] = ()) -> st.SearchStrategy[Any]:
    """Draw one of `documents` with one to three changes, which put in one of `ODD` or of `extra`."""
    values = [*ODD, *extra]
    change = st.tuples(st.integers(0, 7), st.integers(0, 10**6), st.integers(0, 3), st.integers(0, len(values) - 1))
    changes = st.lists(change, min_size=1, max_size=3)
    return st.builds(lambda number, made: _apply(documents[number], made, values), _index(documents), changes)


def _index(items: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(items) - 1)


def _apply(document: Any, changes: list[tuple[int, int, int, int]], values: list[Any]) -> Any:
    made = copy.deepcopy(document)
    for depth, number, kind, value in changes:
        places = list(_places(made, depth + 1)) or list(_places(made, 1))
        if not places:
            return copy.deepcopy(values[value])
        holder, key = places[number % len(places)]
        new = copy.deepcopy(values[value])
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, new)
        elif kind == 1:
            holder[str(new)] = holder.pop(key)
        else:
            holder[key] = new
    return made


def _places(value: Any, depth: int) -> list[tuple[Any, Any]]:
    """Return the holders and keys of what lies `depth` steps inside `value`."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if depth == 1:
        return [(value, key) for key in keys]
    return [place for key in keys for place in _places(value[key], depth - 1)]
