"""What every criterion is: something that turns a model and a task's batches into a score for every unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InvalidInputError
from secateur.settings import Cut, Reading
from secateur.sites.gating import HeadReading, probe
from secateur.sites.layout import AttentionSite
from secateur.support.processes import in_order
from secateur.texts.batches import Batch
from secateur.texts.data import Task
from secateur.texts.sources import Source
from secateur.texts.stopping import Settling

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Supervision:
    """What criteria that need labels get besides the batches.

    `model` is the model that the caller gave, with whatever head it has. `labels` holds a tensor `[batch]` for each
    batch: int64 classes, or float32 for a regression. `task` holds the same labels with their texts, to fine-tune on;
    where the caller gave ready inputs, `tokenizer` is None and the texts are placeholders.
    """

    model: PreTrainedModel
    labels: Sequence[Tensor]
    task: Task
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int


@dataclass(frozen=True)
class ScoringTask:
    """All that a criterion may look at.

    `model` is the base model, in eval mode; `sites` are of one kind. `source` has the batches of keyword arguments of
    its forward: criteria that stream read them once, by `each`; others find them in the list `batches`. `reading` says
    with which seed, by which processes and with which progress bars, `cut` what the caller means to remove, for
    criteria that learn a subset of that size. `special_ids` are the token ids that stand for no word: of the start and
    end of a text, separators and padding. `supervision` is there for criteria that need labels alone. `settling`, if
    any, is asked after every batch by criteria that stream, and may end the reading.
    """

    model: PreTrainedModel
    sites: Mapping[str, Any]
    source: Source | None = None
    reading: Reading = field(default_factory=Reading)
    cut: Cut = field(default_factory=Cut)
    special_ids: frozenset[int] = frozenset()
    supervision: Supervision | None = None
    settling: Settling | None = None

    @cached_property
    def batches(self) -> list[Batch]:
        """Every batch, held in memory."""
        return [] if self.source is None else [self.source.make(part) for part in self.source.parts()]

    @property
    def is_pair(self) -> bool:
        """Whether each text is a pair of sentences, which decides how a text is represented."""
        return self.source is not None and self.source.is_pair

    def track(self, items: Iterable[Any], total: int | None, what: str) -> Iterable[Any]:
        """Wrap `items` in a progress bar on stderr where the caller wants one."""
        return tqdm(items, total=total, desc=what, disable=not self.reading.progress, leave=False)

    def share(
        self, compute: Callable[[Item], Result], items: Iterable[Item], what: str = "scoring"
    ) -> Iterable[Result]:
        """Yield `compute(item)` for each item in order, computed by this process or another: see `in_order`."""
        total = len(items) if isinstance(items, Sequence) else None
        return self.track(in_order(compute, items, self.reading.accelerator), total, what)

    def each(self, compute: Callable[[Batch], Result]) -> Iterable[Result]:
        """Yield `compute(batch)` for each batch in order, with tensors on the CPU, as `share` does."""
        source = self.source
        return [] if source is None else self.share(lambda part: compute(source.make(part)), source.parts())


class Scorer(ABC):
    """A criterion of the importance of units.

    Subclasses set `kinds` (the kinds of units that they score), `description` (one line), `source` (paper or "this
    project"), `passes` (forward passes over the texts, in words), `needs_texts`, `needs_labels` (with a model that is
    fine-tuned on them: see `LabelledScorer`), `needs_gradients` (whether they back-propagate through the model),
    `needs_ratio` (whether scores are good for one pruning ratio alone) and `texts_apart` (whether each text is read by
    itself, so that it does not matter which ones share a batch), and implement `score`. Options are constructor
    arguments with defaults.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({AttentionSite.kind})
    description: ClassVar[str]
    source: ClassVar[str]
    passes: ClassVar[str]
    needs_texts: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_ratio: ClassVar[bool] = False
    texts_apart: ClassVar[bool] = False

    @abstractmethod
    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Return, for each site, the importance of the units that are there now: `[units]`, finite, higher = keep.

        Or a symmetric matrix `[units, units]` whose diagonal is the importance and whose sum over the rows and columns
        of several units is what removing all of them costs: the `interactions` of `Scores`.
        """


class StreamingScorer(Scorer):
    """A criterion that is a mean over texts of something read from each head in one dense pass.

    Subclasses implement `read`; set `weights` where attention maps are needed, or say by `reads_maps` for which tasks.
    """

    passes = "1"
    texts_apart = True
    weights: ClassVar[bool] = False

    @abstractmethod
    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return a score for each text and head, `[batch, heads]`, higher = keep."""

    def reads_maps(self, task: ScoringTask) -> bool:
        """Return whether `read` looks at attention maps when it scores this task."""
        return self.weights

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Stream the batches through the model once; at most one site's maps exist at any time."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        batch: Batch = {}
        latest: dict[str, list[Tensor]] = {}

        def add(reading: HeadReading) -> None:
            rows = self.read(reading, batch, task).double().cpu()
            if not bool(torch.isfinite(rows).all()):
                raise InvalidInputError(
                    f"the scores of site {reading.site} are not finite; check the model's weights, or compute in "
                    "float32 or bfloat16"
                )
            latest.setdefault(reading.site, []).append(rows)

        def run(one: Batch) -> dict[str, tuple[Tensor, int, Tensor | None]]:
            """Return, for each site, the sum over texts and over the layers that share it, of how many, and by text."""
            nonlocal batch
            batch = one
            latest.clear()
            task.model(**batch)
            return {
                site: (
                    torch.stack([part.sum(dim=0) for part in rows]).sum(dim=0),
                    sum(len(part) for part in rows),
                    None if task.settling is None else torch.stack(rows).mean(dim=0),
                )
                for site, rows in latest.items()
            }

        with torch.no_grad(), probe(task.model, add, weights=self.reads_maps(task)):
            for found in task.each(run):
                for site, (total, count, _) in found.items():
                    sums[site] = sums.get(site, torch.zeros(total.shape)) + total
                    counts[site] = counts.get(site, 0) + count
                if task.settling is not None:
                    task.settling.add({site: rows for site, (_, _, rows) in found.items() if rows is not None})
                    if task.settling.settled():
                        break
        # A site that an earlier pruning left without heads may never be reached.
        return {name: sums[name] / counts[name] if name in sums else torch.zeros(0) for name in task.sites}
