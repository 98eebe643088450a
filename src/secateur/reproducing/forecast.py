"""How long a reproduction will take, from a few passes of its model over a few of its texts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from secateur.comparing.plan import DENSE, Run, Settings
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.subjects import Subject
from secateur.texts.data import Task

Splits = Mapping[str, tuple[Task, Task]]

_TRIED = 16  # texts a pass
# In passes of the dense model over one text; benchmarks/results/meta_step_cost_at_128.jsonl has the first two.
_META_STEP, _PRUNER_ALONE, _FINETUNING = 4.5, 1.6, 3.5
_STARTING = 2.0  # seconds in which a run loads its model


def pass_seconds(subject: Subject, places: Splits, max_length: int) -> dict[str, float]:
    """Return the seconds that the dense model takes for one text of each task; the first pass of all is not counted."""
    found: dict[str, float] = {}
    for place, (train, _) in places.items():
        batch = subject.batch(train.texts[:_TRIED], max_length)
        for _ in range(2 - bool(found)):
            start = time.perf_counter()
            with torch.no_grad():
                subject.model(**batch)[0].cpu()  # waits for a GPU
            seconds = time.perf_counter() - start
        found[place] = seconds / len(batch["input_ids"])
    return found


def meta_training_seconds(
    subject: Subject, passes: Mapping[str, float], tasks: Sequence[str], config: MetaTrainingConfig, steps: int
) -> float:
    """Return how long `steps` updates will take, from the seconds of `pass_seconds`."""
    texts = steps * config.batches_per_step * config.batch_size
    if config.signal == "leave_one_out" and config.pool:
        once = config.pool * len(tasks) * config.batch_size * (1 + sum(subject.heads.values()))
        return statistics.fmean(passes[place] for place in tasks) * (once + _PRUNER_ALONE * texts)
    return statistics.fmean(passes[place] for place in tasks) * _META_STEP * texts


def comparison_seconds(
    passes: Mapping[str, float], places: Splits, settings: Settings, runs: Sequence[Run], jobs: int, device: str
) -> float:
    """Return how long fine-tuning and scoring for `runs` will take with `jobs` at once."""
    total, protocol = 0.0, settings.training
    for run in runs:
        train, dev = map(len, places[run.data])
        most = train if protocol.max_train is None else min(train, protocol.max_train)
        scored = 0 if run.scorer == DENSE else min(train, settings.num_texts)
        total += passes[run.data] * (_FINETUNING * protocol.epochs * most + dev + 2 * scored)
        total += _STARTING
    if device != "cpu":
        return total / jobs
    # A pass was timed with all threads, and a run has its own.
    used = min(jobs * settings.threads, os.cpu_count() or 1)
    return total * torch.get_num_threads() / used
