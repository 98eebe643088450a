"""What each scale of `secateur reproduce` means, at one glance. Importing this is cheap: the command reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCORERS = ("smp", "random", "contribution")
"""Beside the dense model: the paper's criterion, what it must beat, and what needs no training."""


@dataclass(frozen=True)
class Scale:
    """How much of the paper's experiment is done.

    `model` is a Hub id; None is the encoder that the demo installs. The pruner learns on `meta_tasks`, and all scorers
    are compared on `tasks`; where these are empty, both are the demo's sentences, `demo_dev_texts` of which judge.
    `meta_training` holds what differs from the paper's settings, which are `MetaTrainingConfig`'s defaults. The other
    settings are those of `compare`: `protocol`'s own where they are None.
    """

    about: str
    model: str | None
    meta_tasks: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int
    protocol: str
    num_texts: int
    max_train: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    demo_dev_texts: int = 1000
    meta_training: Mapping[str, Any] = field(default_factory=dict)


GLUE = ("glue/mnli", "glue/qqp", "glue/sst2", "glue/cola", "glue/stsb", "glue/mrpc", "glue/rte")
"""The tasks that the paper's pruner learns on."""

EVERY_TEXT = 400_000
"""More than any task of GLUE has."""

SCALES = {
    "tiny": Scale(
        about="seconds, to see that a model and data of yours go through; the numbers mean nothing",
        model=None,
        meta_tasks=(),
        tasks=(),
        seeds=1,
        protocol="lite",
        num_texts=8,
        max_train=16,
        epochs=1,
        demo_dev_texts=100,
        meta_training={"steps": 2, "batch_size": 4, "batches_per_step": 1, "max_length": 32, "checkpoint_every": 1},
    ),
    "smoke": Scale(
        about="minutes on two cores, with what the demo installs; too little training for a verdict",
        model=None,
        meta_tasks=(),
        tasks=(),
        seeds=2,
        protocol="lite",
        num_texts=96,
        max_train=400,
        epochs=2,
        demo_dev_texts=400,
        learning_rate=1e-4,
        meta_training={"steps": 30, "batch_size": 16, "batches_per_step": 1, "max_length": 64},
    ),
    "lite": Scale(
        about="hours on two cores; the pruner learns from leave-one-out, as the one that ships did",
        model=None,
        meta_tasks=GLUE,
        tasks=("glue/sst2", "glue/stsb", "glue/mrpc", "glue/qnli"),
        seeds=3,
        protocol="lite",
        num_texts=96,
        max_train=1000,
        learning_rate=1e-4,
        meta_training={
            "steps": 300,
            "batch_size": 16,
            "batches_per_step": 1,
            "max_length": 64,
            "signal": "leave_one_out",
            "pool": 8,
            "optimizer": "adam",
            "learning_rate": 0.001,
            "evaluate_every": 50,
            "checkpoint_every": 50,
        },
    ),
    "paper": Scale(
        about="the paper's settings on BERT-base and all of GLUE; days on one GPU",
        model="google-bert/bert-base-uncased",
        meta_tasks=GLUE,
        tasks=(*GLUE, "glue/qnli"),
        seeds=3,
        protocol="full",
        num_texts=EVERY_TEXT,
    ),
}
"""From seconds to days."""
