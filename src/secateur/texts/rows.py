"""Local files of rows, one after the other. They come from anywhere, so each is what its name says or is refused.

Text is UTF-8, with or without a byte order mark; `.gz` is unpacked as it is read. Nothing else is unpacked, whatever
the bytes look like, and nothing is written.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import InvalidInputError, shown
from secateur.support.parsing import short

# The file names that stand for a split, in the order in which they are looked for; the Hub's split names too.
SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "dev_matched", "validation_matched"),
    "test": ("test", "test_matched"),
}
FILE_FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
Choose = Callable[[Sequence[str], str], list[str]]


def stem_and_format(path: Path) -> tuple[str, str]:
    """Return `train` and `.tsv` for train.tsv and for train.tsv.gz."""
    inner = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return inner.stem, inner.suffix.lower()


def read_columns(path: Path, choose: Choose) -> dict[str, list[Any]]:
    """Return the columns that `choose` names when it gets those of the file, and the file's own name.

    Raises what `read_rows` raises, and `InvalidInputError` where there are no rows.
    """
    rows = list(read_rows(path, choose))
    if not rows:
        raise InvalidInputError(f"{path} holds no rows")
    names = choose(list(dict.fromkeys(name for row in rows for name in row)), str(path))
    return {name: [row.get(name) for row in rows] for name in names}


def read_rows(path: Path, choose: Choose) -> Iterator[dict[str, Any]]:
    """Yield each row, read when it is asked for: of .csv, .tsv and .parquet the chosen columns, of JSON all there are.

    Values of .csv and .tsv are strings, of the other formats what they are there. A list in JSON is read whole. Raises
    `InvalidInputError` for what cannot be read as its ending says, with the row, counted from 1 without the header.
    """
    kind = stem_and_format(path)[1]
    try:
        if kind == ".parquet":
            yield from _parquet(path, choose)
            return
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        delimited = kind in (".csv", ".tsv")
        with opened(path, "rt", encoding="utf-8-sig", newline="" if delimited else "\n") as file:
            lines = _without_nul(path, file)
            yield from _delimited(path, lines, kind, choose) if delimited else _objects(path, lines)
    except InvalidInputError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text: {short(error)}") from error
    except Exception as error:  # gzip, csv, JSON and Parquet fail with types of their own
        raise InvalidInputError(f"{path} cannot be read as {kind}: {short(error)}") from error


def _without_nul(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\0" in line:
            raise InvalidInputError(f"{path} is no text: it holds NUL characters, as archives do")
        yield line


def _delimited(path: Path, lines: Iterable[str], kind: str, choose: Choose) -> Iterator[dict[str, Any]]:
    # A .tsv is GLUE's own form: a quotation mark is a character like any other.
    form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"delimiter": ",", "strict": True}
    rows = (row for row in _of_any_length(csv.reader(lines, **form)) if row)
    header = next(rows, None)
    if header is None:
        return
    places: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if not places:
            places = {name: header.index(name) for name in choose(header, str(path))}
        if len(row) > len(header) or len(row) <= max(places.values()):
            raise InvalidInputError(f"{path}: row {number} has {len(row)} fields, the header has {len(header)}")
        yield {name: row[at] for name, at in places.items()}


def _of_any_length(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Lift csv's limit on the length of a field while a row is read; it is the whole process's."""
    while True:
        longest = csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(longest)
        if row is None:
            return
        yield row


def _objects(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Read one object a line, or a list of objects."""
    for number, row in enumerate(_json(path, lines), 1):
        if not isinstance(row, dict):
            raise InvalidInputError(f"{path}: row {number} must be an object, got {shown(row)}")
        yield row


def _json(path: Path, lines: Iterator[str]) -> Iterator[Any]:
    number = 0
    for line in lines:
        if not number and line.lstrip().startswith("["):
            yield from json.loads(line + "".join(lines), object_pairs_hook=_object)
            return
        if line.strip():
            number += 1
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                raise InvalidInputError(f"{path}: row {number} is no JSON: {short(error)}") from None
            yield row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object has one name twice")
    return row


def _parquet(path: Path, choose: Choose) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = choose(file.schema_arrow.names, str(path))
        for part in file.iter_batches(1024, columns=names):
            yield from part.to_pylist()
