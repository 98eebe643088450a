"""Texts that are read as they are needed, one batch at a time: more than fit in memory, from files or the Hub."""

from __future__ import annotations

import glob
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.errors import InvalidInputError, invalid, shown
from secateur.texts.data import SPLIT_NAMES, hub_id, needed_columns
from secateur.texts.rows import FILE_FORMATS, one_line, read_rows, stem_and_format
from secateur.texts.tokenization import Text, batches, check_texts

Item = TypeVar("Item")

BUFFER = 10_000
"""Texts among which a stream is shuffled."""


class BatchStream:
    """Batches of texts that come one after the other, in unknown number; it can be read once.

    Batches are the lists of `parts`, which `make` turns into keyword arguments of the model: whoever shares the work
    reads every part and makes few. Raises `InvalidInputError` for no texts and for what `check_texts` refuses.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Iterable[Text],
        batch_size: int,
        max_length: int,
        device: torch.device,
        arguments: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    ) -> None:
        if batch_size < 1:
            raise invalid("batch_size", "be at least 1", batch_size)
        left = iter(texts)
        self.first = list(itertools.islice(left, 1))
        check_texts(self.first)
        self.texts = itertools.chain(self.first, left)
        self.options = (batch_size, max_length, device)
        self.tokenizer, self.arguments = tokenizer, arguments
        self.seen = 0

    def parts(self) -> Iterator[list[Text]]:
        """Yield the texts of one batch after the other."""
        while part := list(itertools.islice(self.texts, self.options[0])):
            check_texts([*self.first, *part])  # all of one kind
            self.seen += len(part)
            yield part

    def make(self, part: list[Text]) -> Mapping[str, Any]:
        """Tokenise one batch."""
        return self.arguments(batches(self.tokenizer, part, *self.options)[0])


def stream_texts(data: str | Path, split: str = "train", seed: int | None = None) -> Iterator[Text]:
    """Yield the texts of one split, read as they are asked for; labels are left out.

    `data` is a file as for `load_task`, gzipped or not, whose .json holds one object a line; a pattern of such files
    (`shards/*.parquet`), read in the order of their names; a folder with one file a split or with shards
    (`train-00000-of-00064.parquet`); or a Hub id, which is streamed without being downloaded first. With a `seed` the
    texts are shuffled among the next 10,000, which is random over a whole data set only as far as it lay in no order.

    Raises `InvalidInputError` for whatever is missing or unreadable, naming the file and the row.
    """
    files = _files(str(data), split)
    rows = itertools.chain.from_iterable(map(_texts_of, files)) if files else _hub(data, split)
    return rows if seed is None else shuffled(rows, random.Random(seed))


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


def _texts_of(file: Path) -> Iterator[Text]:
    if stem_and_format(file)[1] not in FILE_FORMATS:
        raise invalid("data", f"name files with one of the endings {', '.join(FILE_FORMATS)}", str(file))
    return _chosen(read_rows(file, needed_columns), str(file))


def _chosen(rows: Iterator[Mapping[str, Any]], source: str) -> Iterator[Text]:
    """Pick the text columns, which the first row decides."""
    names: list[str] = []
    for number, row in enumerate(rows, 1):
        names = names or [name for name in needed_columns(list(row), source) if name != "label"]
        values = [row.get(name) for name in names]
        if not all(isinstance(value, str) for value in values):
            raise InvalidInputError(f"{source}: {' and '.join(names)} must be text in row {number}, got {shown(row)}")
        yield values[0] if len(values) == 1 else tuple(values)  # type: ignore[misc]
    if not names:
        raise InvalidInputError(f"{source} holds no rows")


def _hub(data: str | Path, split: str) -> Iterator[Text]:
    import datasets

    repository, config = hub_id(data)
    try:
        splits = datasets.load_dataset(repository, config, streaming=True)
    except Exception as error:  # the Hub, the network and each file format fail with types of their own
        raise InvalidInputError(f"{str(data)!r} is no file, and the Hub did not give it ({one_line(error)})") from error
    name = next((name for name in SPLIT_NAMES[split] if name in splits), None)
    if name is None:
        raise InvalidInputError(f"{data} has no {split} split: found {', '.join(splits)}")
    return _chosen(iter(splits[name]), str(data))
