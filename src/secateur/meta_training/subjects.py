"""What a meta-pruner learns on: frozen models, and tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import UnsupportedModelError, invalid
from secateur.models.base_model import base_of
from secateur.models.inputs import forward_arguments
from secateur.sites.gating import count_heads
from secateur.texts.batches import Batch
from secateur.texts.data import Task
from secateur.texts.tokenization import batches, padded, rows_of, tokenize

_ALIKE = 16  # tokens: texts whose lengths round up to the same multiple share a part


@dataclass(frozen=True, eq=False)
class Parts:
    """One batch of texts in parts of like length, so that little padding is computed.

    `batches` are the parts' keyword arguments for the model; `places` `[texts]` tells where each text of the batch lies
    among those of all parts.
    """

    batches: Sequence[Batch]
    places: Tensor

    def joined(self, rows: Iterable[Tensor]) -> Tensor:
        """Put the rows of all parts, `[texts of a part, …]` each, into the order of the batch."""
        found = torch.cat(list(rows))
        return found[self.places.to(found.device)]


class Subject:
    """A frozen model that the pruner learns on, with its tokenizer and each site's number of heads.

    The model is put into eval mode and its weights are frozen; nothing else about it changes. Raises
    `UnsupportedModelError` for a model that reads no texts.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model: PreTrainedModel = base_of(model).eval().requires_grad_(False)
        if self.model.main_input_name != "input_ids":
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads {self.model.main_input_name}; a meta-pruner learns on models "
                "that read texts"
            )
        self.tokenizer = tokenizer
        sample = self.batch(["a", "b"], max_length=8)
        self.heads = {site: heads for site, (heads, _) in count_heads(self.model, sample).items()}

    def batch(self, texts: Sequence[Any], max_length: int) -> Batch:
        """Return one batch of keyword arguments for the model."""
        return self.batches(texts, len(texts), max_length)[0]

    def parts(self, texts: Sequence[Any], max_length: int) -> Parts:
        """Return one batch in parts of like length."""
        rows = rows_of(tokenize(self.tokenizer, texts, max_length))
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        alike = groupby(order, key=lambda number: -(-len(rows[number]["input_ids"]) // _ALIKE))
        tokens = [padded(self.tokenizer, [rows[i] for i in part], self.model.device) for _, part in alike]
        return Parts(forward_arguments(self.model, tokens), torch.tensor(order).argsort())

    def batches(self, texts: Sequence[Any], batch_size: int, max_length: int) -> Sequence[Batch]:
        """Return consecutive batches of keyword arguments for the model."""
        tokens = batches(self.tokenizer, texts, batch_size, max_length, device=self.model.device)
        return forward_arguments(self.model, tokens)


def check_subjects(subjects: Any) -> None:
    """Raise `InvalidInputError` unless there is at least one model to learn on, and nothing else."""
    _check_list("subjects", subjects, Subject)


def check_tasks(tasks: Any) -> None:
    """Raise `InvalidInputError` unless there is at least one task, and nothing else."""
    _check_list("tasks", tasks, Task)


def _check_list(name: str, values: Any, kind: type) -> None:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(value, kind) for value in values):
        raise invalid(name, f"be a list of at least one {kind.__name__}", values)
