"""Local files of rows, read into columns. They come from anywhere, so each is taken for what its name says or refused.

Text is UTF-8, with or without a byte order mark; `.gz` is unpacked in memory. Nothing else is unpacked, whatever the
bytes look like, and nothing is written.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import InvalidInputError, shown

FILE_FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Choose = Callable[[Sequence[str], str], list[str]]


def stem_and_format(path: Path) -> tuple[str, str]:
    """Return `train` and `.tsv` for train.tsv and for train.tsv.gz."""
    inner = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return inner.stem, inner.suffix.lower()


def read_columns(path: Path, choose: Choose) -> dict[str, list[Any]]:
    """Return the columns that `choose` names when it is given those of the file, and the file's own name.

    Values of .csv and .tsv are strings, of the other formats what they are there, None where a row has none. Raises
    `InvalidInputError` for what cannot be read as its ending says, with the row, counted from 1 without the header.
    """
    kind = stem_and_format(path)[1]
    try:
        if kind == ".parquet":
            return _parquet(path, choose)
        text = _text(path)
        return _delimited(path, text, kind, choose) if kind in (".csv", ".tsv") else _objects(path, text, choose)
    except InvalidInputError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text: {one_line(error)}") from error
    except Exception as error:  # gzip, csv, JSON and Parquet fail with types of their own
        raise InvalidInputError(f"{path} cannot be read as {kind}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 200 characters, or its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _text(path: Path) -> str:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        text = file.read().decode("utf-8-sig")
    if "\0" in text:
        raise InvalidInputError(f"{path} is no text: it holds NUL characters, as archives do")
    return text


def _delimited(path: Path, text: str, kind: str, choose: Choose) -> dict[str, list[Any]]:
    # A .tsv is GLUE's own form: a quotation mark is a character like any other.
    form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"delimiter": ",", "strict": True}
    longest = csv.field_size_limit(sys.maxsize)
    try:
        lines = (row for row in csv.reader(io.StringIO(text, newline=""), **form) if row)
        header = next(lines, [])
        rows = list(lines)
    finally:
        csv.field_size_limit(longest)
    if not rows:
        raise InvalidInputError(f"{path} holds no rows")
    names = choose(header, str(path))
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise InvalidInputError(f"{path}: row {number} has {len(row)} fields, the header has {len(header)}")
    return {name: [row[at] if at < len(row) else "" for row in rows] for name in names for at in [header.index(name)]}


def _objects(path: Path, text: str, choose: Choose) -> dict[str, list[Any]]:
    """Read one object a line, or a list of objects."""
    if text.lstrip().startswith("["):
        rows = json.loads(text, object_pairs_hook=_object)
    else:
        rows = []
        for line in text.split("\n"):
            if line.strip():
                try:
                    rows.append(json.loads(line, object_pairs_hook=_object))
                except ValueError as error:
                    raise InvalidInputError(f"{path}: row {len(rows) + 1} is no JSON: {one_line(error)}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InvalidInputError(f"{path}: row {number} must be an object, got {shown(row)}")
    if not rows:
        raise InvalidInputError(f"{path} holds no rows")
    names = choose(list(dict.fromkeys(name for row in rows for name in row)), str(path))
    return {name: [row.get(name) for row in rows] for name in names}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has one name twice")
    return made


def _parquet(path: Path, choose: Choose) -> dict[str, list[Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = choose(file.schema_arrow.names, str(path))
        table = file.read(columns=names)
    return {name: table.column(name).to_pylist() for name in names}
