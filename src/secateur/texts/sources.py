"""Where a scorer's batches come from: texts in a list, texts that come one after the other, or ready inputs."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from secateur.models.inputs import ForwardArguments
from secateur.settings import Reading
from secateur.texts.batches import Batch
from secateur.texts.calibration import PreparedModel, check_reads_texts, is_pair
from secateur.texts.examples import Example, are_rows, check_examples, check_inputs, form_of
from secateur.texts.tokenization import Text, check_texts


class Source(ABC):
    """Batches of keyword arguments for a base model, as `parts`, each of which `make` turns into a batch.

    Whoever shares the work with other processes reads every part and makes few. `is_pair` says whether each text is a
    pair of strings, `total` how many texts there are (infinity where nobody knows), and `seen` how many were read, None
    where that is not known.
    """

    is_pair = False
    total = math.inf
    seen: int | None = None

    @abstractmethod
    def parts(self) -> Iterable[Any]:
        """Return what stands for each batch."""

    @abstractmethod
    def make(self, part: Any) -> Batch:
        """Return a batch."""


class ListedTexts(Source):
    """Texts in a list, or rows of ready inputs, which may be read again and again."""

    def __init__(self, prepared: PreparedModel, texts: Sequence[Example], batch_size: int) -> None:
        self.texts = texts
        self.batches = prepared.batches(texts, batch_size)
        self.is_pair, self.total, self.seen = is_pair(texts), len(texts), len(texts)

    def parts(self) -> Sequence[int]:
        """Return the batches' numbers."""
        return range(len(self.batches))

    def make(self, part: int) -> Batch:
        """Return the batch of that number."""
        return self.batches[part]


class StreamedTexts(Source):
    """Texts that come one after the other, in unknown number; they can be read once.

    Raises `InvalidInputError` for no texts, and for what `check_texts` refuses.
    """

    def __init__(self, prepared: PreparedModel, texts: Iterable[Text], batch_size: int) -> None:
        check_reads_texts(prepared.model)
        left = iter(texts)
        self._first = list(itertools.islice(left, 1))
        check_texts(self._first)
        self._texts = itertools.chain(self._first, left)
        self._prepared, self._batch_size = prepared, batch_size
        self.is_pair, self.seen = is_pair(self._first), 0

    def parts(self) -> Iterator[list[Text]]:
        """Yield the texts of one batch after the other."""
        while part := list(itertools.islice(self._texts, self._batch_size)):
            check_texts([*self._first, *part])  # all of one kind
            self.seen += len(part)  # type: ignore[operator]
            yield part

    def make(self, part: list[Text]) -> Batch:
        """Tokenise one batch."""
        return self._prepared.batch(part)


class ReadyInputs(Source):
    """Batches that the caller made, of whatever the model reads. Raises `InvalidInputError` for anything else."""

    def __init__(self, prepared: PreparedModel, inputs: Any, is_pair: bool = False) -> None:
        check_inputs(inputs)
        self.batches = ForwardArguments(prepared.base, [dict(batch) for batch in inputs])
        self.is_pair = is_pair

    def parts(self) -> Sequence[int]:
        """Return the batches' numbers."""
        return range(len(self.batches))

    def make(self, part: int) -> Batch:
        """Return the batch of that number."""
        return self.batches[part]


def reading_order(examples: Sequence[Any], reading: Reading) -> list[int]:
    """Return which texts, or rows, are read, in which order: as they stand, or at random where not all may be read.

    Rows are read shape by shape, so that they share batches, but where the order must be random to the end.
    """
    check_examples(examples)
    order = list(range(len(examples)))
    if reading.stop != "all":
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(reading.seed)).tolist()
    if reading.stop == "auto":
        return order
    chosen = order if reading.stop == "all" else order[: reading.stop]
    return sorted(chosen, key=lambda number: form_of(examples[number]))


def by_length(examples: Sequence[Any]) -> list[Any]:
    """Return texts from the longest to the shortest, in characters, as what takes most memory comes first, or rows."""
    if are_rows(examples):
        return list(examples)
    return sorted(examples, key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)), reverse=True)
