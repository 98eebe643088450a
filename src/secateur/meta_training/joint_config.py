"""The settings of teaching a joint pruner, and the file by which a run knows them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import CheckpointError, InvalidInputError, invalid
from secateur.meta_training.subjects import Subject
from secateur.relations import RELATED
from secateur.support.checks import check_flag, check_seed, check_whole
from secateur.support.files import read_json, write_text
from secateur.texts.data import Task

SETTINGS = "settings.json"
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


def settle(out: Path, subjects: Sequence[Subject], tasks: Sequence[Task], config: JointTrainingConfig) -> None:
    """Write what the run is made of, or check that it is what the folder holds; samples alone may be added."""
    wanted = {
        "models": [f"{type(subject.model).__name__} {_digest_of_model(subject)}" for subject in subjects],
        "tasks": [f"{task.name}, {len(task)} texts {_digest(repr(task.texts).encode())}" for task in tasks],
        **_saved(config),
    }
    file = out / SETTINGS
    if file.is_file():
        there = read_json(file)
        there = {"search": 0, **there} if isinstance(there, dict) else {}  # earlier versions knew no search
        if not set(wanted) <= set(there):
            raise CheckpointError(f"{file} is of no run of this kind; choose another folder")
        for name in sorted(set(wanted) - {"samples"}):
            if there[name] != wanted[name]:
                raise CheckpointError(
                    f"{out} was made with {name} = {there[name]!r}, not {wanted[name]!r}; go on with the same, or "
                    "choose another folder"
                )
        if config.samples < there["samples"]:
            raise invalid("samples", f"be at least the {there['samples']} of the run in {out}", config.samples)
    write_text(file, json.dumps(wanted, indent=1))


def _saved(config: JointTrainingConfig) -> dict[str, Any]:
    """Return the settings by the names that the file has for them; one is the command line's."""
    return {"judges" if name == "evaluation_batches" else name: value for name, value in asdict(config).items()}


def _digest_of_model(subject: Subject) -> str:
    """Tell a model from others, wherever it was loaded from: by the first numbers of every weight."""
    parts = []
    for name, value in subject.model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        first = value.flatten()[:16].double().cpu().numpy().tobytes()  # exact from any dtype, on any device
        parts.append(f"{name} {tuple(value.shape)} ".encode() + first)
    return _digest(*parts)


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=6).hexdigest()
