"""Texts that are read as they are needed, one batch at a time: more than fit in memory, from files or the Hub."""

from __future__ import annotations

import glob
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import InvalidInputError, invalid, shown
from secateur.texts.data import USUAL_COLUMNS, Columns
from secateur.texts.hub import hub_split
from secateur.texts.rows import FILE_FORMATS, SPLIT_NAMES, read_rows, stem_and_format
from secateur.texts.tokenization import Text

Item = TypeVar("Item")

BUFFER = 10_000
"""Texts among which a stream is shuffled."""


def stream_texts(
    data: str | Path, split: str = "train", seed: int | None = None, columns: Columns = USUAL_COLUMNS
) -> Iterator[Text]:
    """Yield the texts of one split, read as they are asked for; labels are left out.

    `data` is a file as for `load_task`, gzipped or not, whose .json holds one object a line; a pattern of such files
    (`shards/*.parquet`), read in the order of their names; a folder with one file a split or with shards
    (`train-00000-of-00064.parquet`); or a Hub id, which is streamed without being downloaded first. `columns` are those
    of `load_task`. With a `seed` the
    texts are shuffled among the next 10,000, which is random over a whole data set only as far as it lay in no order.

    Raises `InvalidInputError` for whatever is missing or unreadable, naming the file and the row.
    """
    files = _files(str(data), split)
    if files:
        texts: Iterator[Text] = itertools.chain.from_iterable(_texts_of(file, columns) for file in files)
    else:
        texts = _chosen(iter(hub_split(data, split, streaming=True)), str(data), columns)
    return texts if seed is None else shuffled(texts, random.Random(seed))


def shuffled(items: Iterable[Item], draw: random.Random, buffer: int = BUFFER) -> Iterator[Item]:
    """Yield each item in the place of one drawn among the next `buffer`."""
    left = iter(items)
    held = list(itertools.islice(left, buffer))
    for item in left:
        number = draw.randrange(len(held))
        yield held[number]
        held[number] = item
    draw.shuffle(held)
    yield from held


def _files(data: str, split: str) -> list[Path]:
    path = Path(data).expanduser()
    if path.is_dir():
        named = sorted(file for file in path.iterdir() if stem_and_format(file)[1] in FILE_FORMATS)
        for stem in SPLIT_NAMES[split]:
            shards = [
                file for file in named if re.fullmatch(rf"{stem}-\d+(-of-\d+(-[0-9a-f]+)?)?", stem_and_format(file)[0])
            ]
            whole = [file for file in named if stem_and_format(file)[0] == stem]
            if len(whole) > 1 or (whole and shards) or len({stem_and_format(file)[1] for file in shards}) > 1:
                names = ", ".join(file.name for file in whole + shards[:2])
                raise InvalidInputError(f"{path} holds more than one {split} file ({names}); name the file itself")
            if whole or shards:
                return whole or shards
        expected = " or ".join(SPLIT_NAMES[split])
        raise InvalidInputError(f"{path} holds no {split} file: expected {expected} or shards of it")
    if path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path)))]


def _texts_of(file: Path, columns: Columns) -> Iterator[Text]:
    if stem_and_format(file)[1] not in FILE_FORMATS:
        raise invalid("data", f"name files with one of the endings {', '.join(FILE_FORMATS)}", str(file))
    return _chosen(read_rows(file, columns.needed), str(file), columns)


def _chosen(rows: Iterator[Mapping[str, Any]], source: str, columns: Columns) -> Iterator[Text]:
    """Pick the text columns, which the first row decides."""
    names: tuple[str, ...] = ()
    for number, row in enumerate(rows, 1):
        names = names or columns.chosen(list(row), source)[0]
        values = [row.get(name) for name in names]
        if not all(isinstance(value, str) for value in values):
            raise InvalidInputError(f"{source}: {' and '.join(names)} must be text in row {number}, got {shown(row)}")
        yield values[0] if len(values) == 1 else tuple(values)  # type: ignore[misc]
    if not names:
        raise InvalidInputError(f"{source} holds no rows")
