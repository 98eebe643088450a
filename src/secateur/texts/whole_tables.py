"""Tables that were handed over whole, in the place of one of their columns: which one was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any


def is_table(texts: Any) -> bool:
    """Is it a table or mapping, which would be read as the names of its columns or row by row?"""
    return isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names")


def how_to_choose(table: Any) -> str:
    """Return the remedy for a table: its first column of texts, or that of its first split."""
    first = next(iter(table.values()), None) if isinstance(table, Mapping) else None
    if is_table(first):
        split = next(iter(table))
        return how_to_choose(first).replace("ds[", f"ds[{split!r}][")
    names = (table.column_names or []) if hasattr(table, "column_names") else list(table)
    name = _of_texts({name: _first(table[name]) for name in names})
    return f"pass ds[{name!r}] in place of ds" if name else "such as table['sentence']"


def how_to_choose_of_rows(row: Any) -> str:
    """Return the remedy for rows in the place of texts, by one of them: its first value that is a text."""
    name = _of_texts(row) if isinstance(row, Mapping) else None
    return f"pass [row[{name!r}] for row in rows] in place of rows" if name else ""


def _of_texts(row: Mapping[Any, Any]) -> Any:
    return next((name for name, value in row.items() if isinstance(value, str)), None)


def _first(column: Any) -> Any:
    with suppress(Exception):  # a column may be anything
        return next(iter(column), None) if isinstance(column, Iterable) and not isinstance(column, str) else None
    return None
