"""`secateur meta-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Place,
    Positive,
    Ratio,
    length_option,
    models_option,
    seed_option,
    stoppable,
    tasks_option,
    together,
)
from secateur.meta_training.config import MetaTrainingConfig
from secateur.support.defaults import PRUNING_RATIO
from secateur.support.files import is_taken
from secateur.support.run_files import BEST, LOG, PRUNER, SETTINGS


class Sizes(click.ParamType):
    """Whole numbers from 1 with commas between them."""

    name = "n,n,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers, or fail in the one error form."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"`task_sizes` must be whole numbers from 1 with commas, got {value}", param, ctx)
        return tuple(map(int, parts))


config_options = together(
    click.option(
        "--steps", default=MetaTrainingConfig.steps, show_default=True, type=click.IntRange(1),
        help="Optimiser updates.",
    ),
    click.option(
        "--batch-size", default=MetaTrainingConfig.batch_size, show_default=True, type=click.IntRange(3),
        help="Texts a batch.",
    ),
    click.option(
        "--batches-per-step", default=MetaTrainingConfig.batches_per_step, show_default=True, type=click.IntRange(1)
    ),
    click.option("--learning-rate", default=MetaTrainingConfig.learning_rate, show_default=True, type=Positive()),
    click.option(
        "--optimizer", default=MetaTrainingConfig.optimizer, show_default=True, type=click.Choice(["sgd", "adam"])
    ),
    click.option("--ratio", "pruning_ratio", default=PRUNING_RATIO, show_default=True, type=Ratio()),
    click.option(
        "--signal", default=MetaTrainingConfig.signal, show_default=True,
        type=click.Choice(["straight_through", "leave_one_out", "random_masks"]),
        help="What teaches the pruner; the first is the paper's.",
    ),
    click.option(
        "--pool", default=MetaTrainingConfig.pool, show_default=True, type=click.IntRange(0),
        help="Batches a task drawn again; 0 = fresh.",
    ),
    click.option(
        "--task-sizes", default=(), type=Sizes(),
        help="Texts that each task counts as having, with commas, where `--data` is a part of it.",
    ),
    click.option(
        "--task-power", default=MetaTrainingConfig.task_power, show_default=True, type=click.FloatRange(0),
        help="Tasks are drawn in proportion to floor(texts ** power).",
    ),
    click.option("--temperature", default=MetaTrainingConfig.temperature, show_default=True, type=Positive()),
    click.option(
        "--evaluate-every", default=MetaTrainingConfig.evaluate_every, show_default=True, type=click.IntRange(1)
    ),
    click.option(
        "--checkpoint-every", default=MetaTrainingConfig.checkpoint_every, show_default=True, type=click.IntRange(1)
    ),
)  # fmt: skip


@click.command("meta-train")
@models_option
@tasks_option
@click.option("--out", required=True, type=Place(), help="Folder for log, checkpoints and pruner.")
@click.option("--resume", is_flag=True, help="Continue the newest checkpoint in `--out`.")
@config_options
@click.option("--max-minutes", default=None, type=Positive(), help="Stop there, resumable.")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, in `--out`.")
@length_option
@seed_option
def meta_train(
    models: tuple[str, ...], data: tuple[str, ...], out: Path, resume: bool, max_minutes: float | None,
    tensorboard: bool, **settings: Any,
) -> None:  # fmt: skip
    """Meta-train a pruner on the unlabelled texts of several tasks; run it under `accelerate launch` to share the work.

    Dev texts judge the run, those of every task but a single file: the log holds the relational KL of their masks, and
    `best` in `--out` is the pruner that did best there.
    """
    from accelerate import Accelerator

    from secateur.cli.tables import outcome_table, print_table
    from secateur.errors import InvalidInputError, invalid
    from secateur.meta_training.held_out import HeldOut
    from secateur.meta_training.outcomes import Outcome
    from secateur.meta_training.paper import train_meta_pruner
    from secateur.meta_training.runs import latest_checkpoint
    from secateur.meta_training.subjects import Subject
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.texts.data import has_splits, load_task

    config = MetaTrainingConfig(**settings)
    if resume and latest_checkpoint(out) is None and not (out / SETTINGS).is_file() and not (out / LOG).is_file():
        raise InvalidInputError(f"there is no checkpoint to resume in {out}")
    accelerator = Accelerator(log_with="tensorboard" if tensorboard else None, project_dir=str(out))
    if not resume and accelerator.is_main_process and is_taken(out):
        raise invalid("out", "be a new or empty folder", str(out), "go on with --resume, or choose another folder")
    tasks = [load_task(d, "train") for d in data]
    held_out = [HeldOut(load_task(d, "dev")) for d in data if has_splits(d)]
    subjects = [Subject(load_model(m, accelerator.device), load_tokenizer(m)) for m in models]
    with stoppable(f"the checkpoints in {out} stay; go on with --resume"):
        train_meta_pruner(
            subjects, tasks, out, config, held_out=held_out, resume=resume, accelerator=accelerator,
            stop_after=None if max_minutes is None else 60 * max_minutes,
        )  # fmt: skip
    if accelerator.is_main_process:
        outcome = Outcome.read(out)
        if outcome is not None:
            print_table(outcome_table(outcome))
            click.echo(f"best: {out / BEST}, after {outcome.best.step} updates")
        pruner = out / PRUNER
        click.echo(f"pruner: {pruner}" if pruner.is_dir() else f"stopped at {latest_checkpoint(out)}; go on: --resume")
