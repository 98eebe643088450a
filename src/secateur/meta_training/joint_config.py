"""The settings of teaching a joint pruner. Importing this is cheap: the command reads its defaults here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.errors import InvalidInputError
from secateur.support.checks import check_flag, check_seed, check_whole

if TYPE_CHECKING:
    from secateur.texts.data import Task

FEWEST_SCORED = 4
"""Texts that evidence needs: see `gather_evidence`."""


@dataclass(frozen=True)
class JointTrainingConfig:
    """Settings of teaching a joint pruner.

    samples: of each model and task; the masks of a later one lie near what a fit on the earlier ones chooses.
    num_texts: texts that give a sample's evidence. search: exchanges of heads by which the best masks are searched for,
    in place of masks at random and near what scores choose; the pruner learns them, and remembers them of the models.
    evaluation_batches: batches of other texts, of which each mask meets one, and the masks of a search two; fewer where
    a task has too few texts. batch_size: texts a batch. max_length: tokens a text. bf16: evaluate masks by a copy of
    the model in bfloat16, which is faster where the device has it, and far slower on a CPU that has not.
    """

    samples: int = 2
    search: int = 0
    num_texts: int = 96
    evaluation_batches: int = 8
    batch_size: int = 32
    max_length: int = 128
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        from secateur.relations import RELATED  # here, as it imports torch

        check_whole("samples", self.samples)
        check_whole("search", self.search, 0)
        check_whole("num_texts", self.num_texts, FEWEST_SCORED)
        check_whole("evaluation_batches", self.evaluation_batches)
        check_whole("batch_size", self.batch_size, RELATED)
        check_whole("max_length", self.max_length, 4)
        check_flag("bf16", self.bf16)
        check_seed(self.seed)

    def evaluation_batches_of(self, task: Task) -> int:
        """Return how many of them a task has texts for, beside those that give the evidence."""
        return min(self.evaluation_batches, (len(task) - self.num_texts) // self.batch_size)

    def check_texts(self, tasks: Sequence[Task]) -> None:
        """Raise `InvalidInputError` unless every task has texts enough for a sample."""
        fewest = self.num_texts + self.batch_size
        for task in tasks:
            if len(task) < fewest:
                raise InvalidInputError(
                    f"task {task.name} has {len(task)} texts, fewer than the {fewest} that a sample takes: `num_texts` "
                    f"({self.num_texts}) for evidence and a batch ({self.batch_size}) that masks are evaluated on; "
                    "give more texts, or lower either"
                )
