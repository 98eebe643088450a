"""Meta-training as the paper does it: a frozen model, several tasks' unlabelled texts, and a pruner that learns.

It learns to keep the relations between texts. A run can be stopped and goes on from its newest checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from secateur.errors import SecateurError, invalid
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.contents import settle_contents
from secateur.meta_training.held_out import HeldOut, held_out_kl
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.runs import (
    Log,
    check_run_folder,
    held_run,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from secateur.meta_training.subjects import Subject, check_subjects, check_tasks
from secateur.pruners.map_network import MetaPruner
from secateur.support.checks import check_accelerator, check_flag, check_path, check_positive
from secateur.support.files import replaced_folder
from secateur.support.run_files import LOG, PRUNER
from secateur.texts.data import Task


def train_meta_pruner(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    out: str | Path,
    config: MetaTrainingConfig | None = None,
    *,
    held_out: Sequence[HeldOut] = (),
    resume: bool = False,
    progress: bool = True,
    stop_after: float | None = None,
    accelerator: Accelerator | None = None,
) -> MetaPruner:
    """Train a meta-pruner on one or more frozen models and one or more tasks (paper, steps 1 to 6).

    Only the pruner's weights change. `out` gets `log.jsonl` (losses by task at every step; on `held_out` texts the
    relational KL of the deterministic mask), checkpoints, and at the end `pruner/`. With `resume` the newest checkpoint
    there is continued, to the identical next step; without it `out` must be new or empty. `stop_after` seconds the run
    stops at a checkpoint.

    Raises `InvalidInputError` for settings and tasks that cannot be trained on, `CheckpointError` for a checkpoint that
    does not fit and for a run on other models or texts, `SecateurError` for a loss that is not finite.
    """
    config = MetaTrainingConfig() if config is None else config
    check_subjects(subjects)
    check_tasks(tasks)
    if not isinstance(config, MetaTrainingConfig):
        raise invalid("config", "be a MetaTrainingConfig", config)
    _check_run(held_out, resume, progress, stop_after, accelerator)
    out, accelerator = check_path("out", out), accelerator or Accelerator()
    if accelerator.is_main_process:
        check_run_folder(out, resume)
    training = MetaTraining(subjects, tasks, config, accelerator)
    with held_run(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            settle_contents(out, subjects, tasks)
        last = latest_checkpoint(out)
        if resume and last is not None:
            training.step = load_checkpoint(last, training.pruner, training.optimizer, config)
        if resume and progress and accelerator.is_main_process:
            where = last or "the start, as there is no checkpoint yet"
            tqdm.write(f"going on from {where}; {config.steps - training.step} steps are left", file=sys.stderr)
        accelerator.wait_for_everyone()  # the main process is about to write where the others have just looked
        return run(training, out, held_out, progress, stop_after)


def _check_run(held_out: Any, resume: Any, progress: Any, stop_after: Any, accelerator: Any) -> None:
    if not isinstance(held_out, list | tuple) or not all(isinstance(part, HeldOut) for part in held_out):
        raise invalid("held_out", "be a list of HeldOut", held_out)
    check_flag("resume", resume)
    check_flag("progress", progress)
    if stop_after is not None:
        check_positive("stop_after", stop_after)
    check_accelerator(accelerator)


def run(
    training: MetaTraining,
    out: Path,
    held_out: Sequence[HeldOut] = (),
    progress: bool = True,
    stop_after: float | None = None,
) -> MetaPruner:
    """Train until `config.steps` (paper, step 6); see `train_meta_pruner` for what `out` gets."""
    config, pruner, accelerator = training.config, training.pruner, training.accelerator
    accelerator.init_trackers("meta-training")
    start = time.perf_counter()
    record = _Record(training, out, held_out, progress) if accelerator.is_main_process else None
    overdue = False
    while training.step < config.steps and not overdue:
        try:
            losses = training.gradients(training.step)
        except SecateurError as error:
            last = latest_checkpoint(out)
            raise SecateurError(f"{error}; the last good checkpoint is {last or 'none'}") from None
        norm = float(nn.utils.clip_grad_norm_(pruner.parameters(), config.clip))
        training.optimizer.step()
        training.step += 1
        overdue = stop_after is not None and time.perf_counter() - start > stop_after
        if record is not None:
            record.step(losses, norm, ends=overdue or training.step == config.steps)
    if record is not None:
        record.bar.close()
    accelerator.wait_for_everyone()  # others must not leave while the main process is still writing
    accelerator.end_training()
    pruner.eval()
    if record is not None and training.step >= config.steps:
        with replaced_folder(out / PRUNER) as folder:
            pruner.save_pretrained(folder)
    return pruner


class _Record:
    """What the main process writes of a run: its log, trackers and checkpoints, and a progress bar."""

    def __init__(self, training: MetaTraining, out: Path, held_out: Sequence[HeldOut], progress: bool) -> None:
        self.training, self.out, self.held_out = training, out, held_out
        self.log = Log(out / LOG, training.step)
        if held_out and training.step == 0:
            self._evaluate()
        steps = training.config.steps
        self.bar = tqdm(total=steps, initial=training.step, desc="meta-training", disable=not progress)

    def step(self, losses: Mapping[str, Sequence[float]], norm: float, ends: bool) -> None:
        """Take in a step that was made: its losses by task, and its gradient's norm."""
        training, config = self.training, self.training.config
        means = {task: sum(row) / len(row) for task, row in sorted(losses.items())}
        self.log.write({"step": training.step, "losses": means, "gradient_norm": norm})
        tracked = {f"loss/{task}": mean for task, mean in means.items()} | {"gradient_norm": norm}
        training.accelerator.log(tracked, training.step)
        self.bar.set_postfix({task: f"{mean:.3f}" for task, mean in means.items()}, refresh=False)
        if self.held_out and (ends or training.step % config.evaluate_every == 0):
            kl = self._evaluate()
            training.accelerator.log({f"held_out/{task}": value for task, value in kl.items()}, training.step)
        if ends or training.step % config.checkpoint_every == 0:
            save_checkpoint(self.out, training.step, training.pruner, training.optimizer, config)
        self.bar.update()

    def _evaluate(self) -> dict[str, float]:
        training, config = self.training, self.training.config
        kl = held_out_kl(training.pruner, training.subjects[0], self.held_out, config.pruning_ratio, config.max_length)
        self.log.write({"step": training.step, "held_out": kl})
        return kl
