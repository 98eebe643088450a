"""What a model reads, one by one: texts, or the rows of ready inputs, for steps that choose among either."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.support.checks import check_mapping
from secateur.texts.tokenization import Text, check_texts


class Row(dict[str, Any]):
    """One example of ready inputs: tensors `[1, …]`, and switches such as `use_cache` as they are."""

    @cached_property
    def form(self) -> str:
        """What rows have in common that may share a batch: the shapes of their tensors, and the switches."""
        return repr([(name, x.shape if isinstance(x, Tensor) else x) for name, x in self.items()])


Example: TypeAlias = Text | Row


def examples_of(texts: Sequence[Any] | None, inputs: Any) -> Sequence[Example]:
    """Return what a step reads: texts in a list, or the rows of `inputs`; rows in place of texts stay as they are.

    Raises `InvalidInputError` for neither and for both, for what `check_texts` refuses, and for inputs that are no list
    of mappings to tensors whose first dimension counts examples.
    """
    if inputs is None:
        if texts is None:
            raise invalid("texts", "be given, or `inputs`", texts)
        check_examples(texts)
        return texts
    check_inputs(inputs)
    if texts is not None:
        raise invalid("texts", "be left out where `inputs` are given", texts)
    return [row for number, batch in enumerate(inputs) for row in _rows(f"inputs[{number}]", batch)]


def check_inputs(inputs: Any) -> None:
    """Raise `InvalidInputError` unless `inputs` is a list of batches: mappings from names."""
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not inputs:
        raise invalid("inputs", "be a list of at least one batch", inputs)
    for number, batch in enumerate(inputs):
        check_mapping(f"inputs[{number}]", batch)


def check_examples(examples: Any) -> None:
    """Raise `InvalidInputError` unless these are rows of ready inputs, or what `check_texts` takes."""
    if not are_rows(examples):
        check_texts(examples)


def are_rows(examples: Any) -> bool:
    """Whether these are rows of ready inputs, and no texts."""
    return isinstance(examples, Sequence) and len(examples) > 0 and isinstance(examples[0], Row)


def source_of(examples: Any) -> str:
    """Return the name of the parameter that examples came by, for messages."""
    return "inputs" if are_rows(examples) else "texts"


def form_of(example: Example) -> str:
    """Return what examples have in common that may share a batch; texts of any length may."""
    return example.form if isinstance(example, Row) else ""


def in_parts(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Return consecutive examples, at most `size` at a time, that may share a batch."""
    alike = [list(group) for _, group in groupby(examples, form_of)]
    return [group[start : start + size] for group in alike for start in range(0, len(group), size)]


def by_form(examples: Sequence[Example]) -> list[Example]:
    """Return examples form by form, each in the order given, so that as many as can share batches."""
    return sorted(examples, key=form_of)


def shuffled_parts(examples: Sequence[Example], size: int, seed: int) -> list[list[Example]]:
    """Return examples, at most `size` at a time, drawn at random from those that may share a batch."""
    drawn = random.Random(seed).sample(examples, len(examples))
    return in_parts(by_form(drawn), size)


def joined(rows: Sequence[Any], device: str | torch.device) -> dict[str, Any]:
    """Return one batch of rows that are of one form, its tensors on `device` and ahead of its switches."""
    first = rows[0]
    tensors = [name for name, value in first.items() if isinstance(value, Tensor)]
    batch = {name: torch.cat([row[name] for row in rows]).to(device) for name in tensors}
    return batch | {name: value for name, value in first.items() if name not in batch}


def _rows(name: str, batch: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the examples of a batch."""
    for key, value in batch.items():
        if not isinstance(value, Tensor | bool | int | float | str | None):
            raise invalid(f"{name}[{key!r}]", "be a tensor or a switch", type(value).__name__)
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if not tensors:
        raise invalid(name, "hold a tensor with a row for each example", list(batch))
    size = len(next(iter(tensors.values())))
    if not size:
        raise invalid(name, "hold at least one example", {key: tuple(value.shape) for key, value in tensors.items()})
    for key, value in tensors.items():
        if len(value) != size:
            rule = f"have a row for each of the {size} examples"
            raise invalid(f"{name}[{key!r}]", rule, tuple(value.shape), "what examples share cannot be told apart")
    for number in range(size):
        yield Row({key: value[number : number + 1] if key in tensors else value for key, value in batch.items()})
