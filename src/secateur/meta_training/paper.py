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
from secateur.meta_training.held_out import HeldOut, Judge
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.outcomes import Outcome
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
from secateur.support.durations import duration
from secateur.support.files import replaced_folder
from secateur.support.processes import from_main, own_accelerator
from secateur.support.run_files import BEST, LOG, PRUNER
from secateur.texts.data import Task

SHORTER = (
    "--steps 300 --batch-size 16 --batches-per-step 1 --max-length 64 --signal leave_one_out --pool 8 "
    "--optimizer adam --learning-rate 0.001"
)
"""The recipe of the shipped pruner, on the command line."""

_LONG = 1800.0  # seconds of a run that somebody may want to be shorter


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
    relational KL of the masks that each model would be pruned by), checkpoints, in `best/` the pruner that did best on
    `held_out`, and at the end `pruner/`. With `resume` the newest checkpoint there is continued, to the identical next
    step; without it `out` must be new or empty. `stop_after` seconds the run stops at a checkpoint, as the main process
    decides for all. With `progress`, standard error says after the first update how long the run will take.

    Raises `InvalidInputError` for settings and tasks that cannot be trained on, `CheckpointError` for a checkpoint that
    does not fit and for a run on other models or texts, `SecateurError` for a loss that is not finite.
    """
    config = MetaTrainingConfig() if config is None else config
    check_subjects(subjects)
    check_tasks(tasks)
    if not isinstance(config, MetaTrainingConfig):
        raise invalid("config", "be a MetaTrainingConfig", config)
    _check_run(held_out, resume, progress, stop_after, accelerator)
    out, accelerator = check_path("out", out), accelerator or own_accelerator()
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
        if stop_after is not None:  # one clock for all processes: one that stopped alone would leave others waiting
            overdue = from_main(lambda: time.perf_counter() - start > stop_after, accelerator)
        if record is not None:
            record.step(losses, norm, ends=overdue or training.step == config.steps)
    if record is not None:
        record.bar.close()
    accelerator.wait_for_everyone()  # others must not leave while the main process is still writing
    accelerator.end_training()
    pruner.eval()
    if record is not None and training.step >= config.steps:
        _save(pruner, out / PRUNER)
    return pruner


class _Record:
    """What the main process writes of a run: its log, trackers, checkpoints and best pruner, and a progress bar."""

    def __init__(self, training: MetaTraining, out: Path, held_out: Sequence[HeldOut], progress: bool) -> None:
        self.training, self.out, self.progress = training, out, progress
        config = training.config
        self.log = Log(out / LOG, training.step)
        self.judge = Judge(training.subjects, held_out, config.pruning_ratio, config.max_length) if held_out else None
        if self.judge is not None and training.step == 0:
            self._evaluate(self.judge)
        self.bar = tqdm(total=config.steps, initial=training.step, desc="meta-training", disable=not progress)
        self.start: float | None = time.perf_counter()

    def step(self, losses: Mapping[str, Sequence[float]], norm: float, ends: bool) -> None:
        """Take in a step that was made: its losses by task, and its gradient's norm."""
        training, config = self.training, self.training.config
        self._estimate()
        means = {task: sum(row) / len(row) for task, row in sorted(losses.items())}
        self.log.write({"step": training.step, "losses": means, "gradient_norm": norm})
        tracked = {f"loss/{task}": mean for task, mean in means.items()} | {"gradient_norm": norm}
        training.accelerator.log(tracked, training.step)
        self.bar.set_postfix({task: f"{mean:.3f}" for task, mean in means.items()}, refresh=False)
        if self.judge is not None and (ends or training.step % config.evaluate_every == 0):
            kl = self._evaluate(self.judge)
            training.accelerator.log({f"held_out/{task}": value for task, value in kl.items()}, training.step)
        if ends or training.step % config.checkpoint_every == 0:
            save_checkpoint(self.out, training.step, training.pruner, training.optimizer, config)
        self.bar.update()

    def _estimate(self) -> None:
        """Say after the first update that is made here how long the others will take."""
        start, self.start = self.start, None
        left = self.training.config.steps - self.training.step
        if start is None or not self.progress or not left:
            return
        seconds = (time.perf_counter() - start) * left
        said = f"about {duration(seconds)} for the {left} updates that are left"
        if seconds > _LONG:
            said += f"; stop sooner with --max-minutes, or train shorter: {SHORTER}"
        tqdm.write(said, file=sys.stderr)

    def _evaluate(self, judge: Judge) -> dict[str, float]:
        """Look at the pruner on held-out texts, and keep it where it is the best so far."""
        training = self.training
        row: dict[str, Any] = {"step": training.step, "held_out": judge.of_pruner(training.pruner)}
        if training.step == 0:
            row["contribution"] = judge.of_contribution()
        so_far = Outcome.read(self.out)
        now = Outcome.of([row])
        assert now is not None
        if so_far is None or now.best.mean < so_far.best.mean:
            _save(training.pruner, self.out / BEST)
        self.log.write(row)  # after the pruner, so that the best that the log knows is there
        kl: dict[str, float] = row["held_out"]
        return kl


def _save(pruner: MetaPruner, place: Path) -> None:
    with replaced_folder(place) as folder:
        pruner.save_pretrained(folder)
