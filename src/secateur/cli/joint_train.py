"""`secateur joint-train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import (
    Place,
    bf16_option,
    json_option,
    length_option,
    models_option,
    print_json,
    seed_option,
    stoppable,
    tasks_option,
    together,
)
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.support.files import is_taken
from secateur.support.run_files import PRUNER, SETTINGS

if TYPE_CHECKING:
    from accelerate import Accelerator

config_options = together(
    click.option(
        "--samples", default=JointTrainingConfig.samples, show_default=True, type=click.IntRange(1),
        help="Samples of each task and model.",
    ),
    click.option(
        "--texts", "num_texts", default=JointTrainingConfig.num_texts, show_default=True, type=click.IntRange(4),
        help="Texts a sample.",
    ),
    click.option(
        "--search", default=JointTrainingConfig.search, show_default=True, type=click.IntRange(0), metavar="N",
        help="Search for the best masks by N exchanges of heads each, and remember them of the model.",
    ),
    click.option(
        "--judges", "evaluation_batches", default=JointTrainingConfig.evaluation_batches, show_default=True,
        type=click.IntRange(1), help="Batches that judge masks.",
    ),
    click.option(
        "--batch-size", default=JointTrainingConfig.batch_size, show_default=True, type=click.IntRange(3),
        help="Texts a batch.",
    ),
)  # fmt: skip


@click.command("joint-train")
@models_option
@tasks_option
@click.option("--out", required=True, type=Place(), help="Folder for samples and pruner.")
@click.option("--resume", is_flag=True, help="Go on with the samples in `--out`; more `--samples` may be asked for.")
@config_options
@length_option
@bf16_option("Judge masks")
@seed_option
@json_option
def joint_train(
    models: tuple[str, ...], data: tuple[str, ...], out: Path, resume: bool, as_json: bool, **settings: Any
) -> None:
    """Teach a joint pruner, for `--scorer smp-plus`, a model of yours on unlabelled texts of one or more tasks.

    Masks are tried on the frozen model, about 270 passes over a batch for each sample; the pruner learns which heads
    cost what. With --search 24 the best masks are searched for, about 500 passes and gradients, and the pruner
    remembers which heads they keep of this model. Dev texts judge it, those of every task but a single file.
    """
    from secateur.cli.tables import held_out_table, print_table
    from secateur.meta_training.joint_held_out import check_held_out, held_out_losses
    from secateur.meta_training.joint_training import train_joint_pruner
    from secateur.meta_training.subjects import Subject
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.texts.data import has_splits, load_task

    config = JointTrainingConfig(**settings)
    accelerator = _accelerator(out, resume)
    tasks = [load_task(d, "train") for d in data]
    held_out = [load_task(d, "dev") for d in data if has_splits(d)]
    for task in held_out:
        check_held_out(task)
    subjects = [Subject(load_model(m, accelerator.device), load_tokenizer(m)) for m in models]
    with stoppable(f"the samples in {out} stay; go on with --resume"):
        pruner = train_joint_pruner(subjects, tasks, out, config, resume=resume, accelerator=accelerator)
        if not accelerator.is_main_process:
            return
        rows = [
            {"model": name, "task": task.name, "allocation": allocation, **relational_kl}
            for name, subject in zip(models, subjects, strict=True)
            for task in held_out
            for allocation, relational_kl in held_out_losses(subject, task, pruner, config).items()
        ]
    place = out / PRUNER
    if as_json:
        print_json({"pruner": str(place), "held_out": rows})
        return
    if rows:
        print_table(held_out_table(rows))
    click.echo(f"pruner: {place}; use it with --scorer smp-plus --pruner {place}")


def _accelerator(out: Path, resume: bool) -> Accelerator:
    """Return this process's place among those of a launcher, the first of which refuses a folder that is not fit."""
    from accelerate import Accelerator

    from secateur.errors import InvalidInputError, invalid

    if resume and not (out / SETTINGS).is_file():
        raise InvalidInputError(f"there is no run to go on with in {out}; leave --resume out")
    accelerator = Accelerator()
    if not resume and accelerator.is_main_process and is_taken(out):
        raise invalid("out", "be a new or empty folder", str(out), "go on with --resume, or choose another folder")
    return accelerator
