"""`distill`, `finetune`, `evaluate`, `meta-train` and `joint-train`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Place,
    Positive,
    Ratio,
    bf16_option,
    json_option,
    length_option,
    out_option,
    print_json,
    seed_option,
    stoppable,
    training_options,
)
from secateur.support.files import check_new_folder, is_taken


@click.command()
@click.argument("model")
@training_options
@click.option("--against", default=None, help="The unpruned model, which teaches [default: the one MODEL names].")
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Optimiser updates.")
@click.option("--learning-rate", default=5e-4, show_default=True, type=Positive())
@click.option(
    "--texts", "num_texts", default=None, type=click.IntRange(1), help="Texts, drawn with the seed [default: all]."
)
@bf16_option
@seed_option
@out_option
def distill(
    model: str, data: str, batch_size: int, max_length: int, device: str | None, as_json: bool, against: str | None,
    steps: int, learning_rate: float, num_texts: int | None, bf16: bool, seed: int, out: Path,
) -> None:  # fmt: skip
    """Teach the pruned MODEL what the unpruned one computes, on texts without labels, before it is fine-tuned."""
    from secateur.models.loading import check_device, load_model, load_tokenizer
    from secateur.models.sentence_transformers import copy_modules
    from secateur.removal.verify import load_original
    from secateur.report import write_report
    from secateur.report.reading import ATTENTION_MAPS, DISTILLATION, PRUNING, read_runs
    from secateur.restoring.distillation import distill_
    from secateur.support.files import new_folder, write_text
    from secateur.texts.data import load_task

    check_new_folder(out)
    chosen = check_device(device)
    task = load_task(data, "train")
    texts = task.head(num_texts or len(task), seed=seed).texts
    pruned, tokenizer = load_model(model, chosen), load_tokenizer(model)
    teacher, _, name = load_original(pruned, model, against, chosen)
    if has_page := (Path(model) / PRUNING).is_file():
        read_runs([model])  # refuses what makes no page before the training, whose result would be lost
    with new_folder(out) as folder:
        settings: dict[str, Any] = {
            "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "max_length": max_length,
            "seed": seed, "bf16": bf16,
        }  # fmt: skip
        before, after = distill_(pruned, teacher, texts, tokenizer, progress=True, **settings)
        place = copy_modules(model, folder)
        pruned.save_pretrained(place)
        tokenizer.save_pretrained(place)
        about = {"model": model, "teacher": name, "texts": len(texts), **settings, "relational_kl": [before, after]}
        write_text(folder / DISTILLATION, json.dumps(about, indent=1))
        # What `prune` wrote of the heads holds on: distillation leaves them where they are.
        for file in (PRUNING, ATTENTION_MAPS):
            if (Path(model) / file).is_file():
                shutil.copyfile(Path(model) / file, folder / file)
        if has_page:
            write_report(read_runs([folder]), folder / "report.html")
    if as_json:
        print_json({**about, "out": str(out)})
    else:
        what = f"after {steps} steps {after:.4f}" if after < before else f"no lower after {steps} steps, so without"
        page = f"\nreport: {out / 'report.html'}" if has_page else ""
        click.echo(f"relational KL on texts held out {before:.4f}, {what}\nmodel: {out}{page}")


@click.command()
@click.argument("model")
@training_options
@click.option("--epochs", default=3.0, show_default=True, type=Positive())
@click.option("--learning-rate", default=2e-5, show_default=True, type=Positive())
@click.option("--max-train", default=None, type=click.IntRange(1), help="Training texts at most, drawn with the seed.")
@bf16_option
@seed_option
@out_option
def finetune(
    model: str, data: str, batch_size: int, max_length: int, device: str | None, as_json: bool, epochs: float,
    learning_rate: float, max_train: int | None, bf16: bool, seed: int, out: Path,
) -> None:  # fmt: skip
    """Fine-tune MODEL, dense or pruned alike, on labelled data with transformers' Trainer."""
    from secateur.finetuning.finetune import finetune as finetune_model
    from secateur.models.loading import check_device
    from secateur.texts.data import has_splits, load_task

    check_new_folder(out)
    chosen = check_device(device)
    train = load_task(data, "train", need_labels=True)
    dev = load_task(data, "dev", need_labels=True) if has_splits(data) else None
    if max_train is not None:
        train = train.head(max_train, seed=seed)
    _, result = finetune_model(
        model, train, dev, out=out, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
        max_length=max_length, seed=seed, bf16=bf16, device=str(chosen),
    )  # fmt: skip
    if as_json:
        print_json({"metrics": result.metrics, "seconds": result.seconds, "steps": result.steps, "out": str(out)})
    else:
        _echo_metrics(result.metrics, result.main_metric)
        click.echo(f"{result.steps} steps in {result.seconds:.1f} s\nmodel: {out}")


@click.command()
@click.argument("model")
@training_options
@click.option("--split", default="dev", show_default=True, type=click.Choice(["train", "dev", "test"]))
def evaluate(
    model: str, data: str, batch_size: int, max_length: int, device: str | None, as_json: bool, split: Any
) -> None:
    """Evaluate a fine-tuned MODEL, dense or pruned alike, with the task's standard metrics."""
    from transformers import AutoModelForSequenceClassification

    from secateur.finetuning.evaluate import evaluate_model, main_metric
    from secateur.models.loading import check_device, load_model, load_tokenizer
    from secateur.texts.data import load_task

    chosen = check_device(device)
    task = load_task(data, split, need_labels=True)
    loaded = load_model(model, chosen, AutoModelForSequenceClassification, whole=True)
    metrics = evaluate_model(loaded, load_tokenizer(model), task, batch_size=batch_size, max_length=max_length)
    if as_json:
        print_json({"metrics": metrics, "texts": len(task)})
    else:
        _echo_metrics(metrics, main_metric(task))


models_option = click.option(
    "--model", "models", multiple=True, required=True, help="Frozen model to learn on; may be repeated."
)
tasks_option = click.option("--data", multiple=True, required=True, help="A task, as for prune; may be repeated.")


@click.command("meta-train")
@models_option
@tasks_option
@click.option("--out", required=True, type=Place(), help="Folder for log, checkpoints and pruner.")
@click.option("--resume", is_flag=True, help="Continue the newest checkpoint in `--out`.")
@click.option("--steps", default=6000, show_default=True, type=click.IntRange(1), help="Optimiser updates.")
@click.option("--batch-size", default=60, show_default=True, type=click.IntRange(3), help="Texts a batch.")
@click.option("--batches-per-step", default=8, show_default=True, type=click.IntRange(1))
@click.option("--learning-rate", default=0.02, show_default=True, type=Positive())
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice(["sgd", "adam"]))
@click.option("--ratio", "pruning_ratio", default=0.5, show_default=True, type=Ratio())
@click.option(
    "--signal",
    default="straight_through",
    show_default=True,
    type=click.Choice(["straight_through", "leave_one_out", "random_masks"]),
    help="What teaches the pruner; the first is the paper's.",
)
@click.option(
    "--pool", default=0, show_default=True, type=click.IntRange(0), help="Batches a task drawn again; 0 = fresh."
)
@click.option("--temperature", default=1.0, show_default=True, type=Positive())
@click.option("--evaluate-every", default=100, show_default=True, type=click.IntRange(1))
@click.option("--checkpoint-every", default=100, show_default=True, type=click.IntRange(1))
@click.option("--max-minutes", default=None, type=Positive(), help="Stop there, resumable.")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, in `--out`.")
@length_option
@seed_option
def meta_train(
    models: tuple[str, ...], data: tuple[str, ...], out: Path, resume: bool, max_minutes: float | None,
    tensorboard: bool, **settings: Any,
) -> None:  # fmt: skip
    """Meta-train a pruner on the unlabelled texts of several tasks; run it under `accelerate launch` to share the work.

    Dev texts judge the run, those of every task but a single file: the log holds the relational KL of their masks.
    """
    from accelerate import Accelerator

    from secateur.errors import InvalidInputError, invalid
    from secateur.meta_training.config import MetaTrainingConfig
    from secateur.meta_training.held_out import HeldOut
    from secateur.meta_training.paper import train_meta_pruner
    from secateur.meta_training.runs import latest_checkpoint
    from secateur.meta_training.subjects import Subject
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.texts.data import has_splits, load_task

    config = MetaTrainingConfig(**settings)
    if resume and latest_checkpoint(out) is None and not (out / "log.jsonl").is_file():
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
        finished = (out / "pruner").is_dir()
        click.echo(f"pruner: {out / 'pruner'}" if finished else f"stopped at {latest_checkpoint(out)}; go on: --resume")


@click.command("joint-train")
@models_option
@tasks_option
@click.option("--out", required=True, type=Place(), help="Folder for samples and pruner.")
@click.option("--resume", is_flag=True, help="Go on with the samples in `--out`; more `--samples` may be asked for.")
@click.option("--samples", default=2, show_default=True, type=click.IntRange(1), help="Samples of each task and model.")
@click.option("--texts", "num_texts", default=96, show_default=True, type=click.IntRange(4), help="Texts a sample.")
@click.option(
    "--search", default=0, show_default=True, type=click.IntRange(0), metavar="N",
    help="Search for the best masks by N exchanges of heads each, and remember them of the model.",
)  # fmt: skip
@click.option(
    "--judges", "evaluation_batches", default=8, show_default=True, type=click.IntRange(1),
    help="Batches that judge masks.",
)  # fmt: skip
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(3), help="Texts a batch.")
@length_option
@click.option(
    "--bf16", is_flag=True,
    help="Judge masks in bfloat16: faster where the device has it, far slower on a CPU that has not.",
)  # fmt: skip
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
    from accelerate import Accelerator

    from secateur.cli.tables import held_out_table, print_table
    from secateur.errors import InvalidInputError, invalid
    from secateur.meta_training.joint_config import JointTrainingConfig
    from secateur.meta_training.joint_held_out import check_held_out, held_out_losses
    from secateur.meta_training.joint_settings import SETTINGS
    from secateur.meta_training.joint_training import train_joint_pruner
    from secateur.meta_training.subjects import Subject
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.texts.data import has_splits, load_task

    config = JointTrainingConfig(**settings)
    if resume and not (out / SETTINGS).is_file():
        raise InvalidInputError(f"there is no run to go on with in {out}; leave --resume out")
    accelerator = Accelerator()
    if not resume and accelerator.is_main_process and is_taken(out):
        raise invalid("out", "be a new or empty folder", str(out), "go on with --resume, or choose another folder")
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
            {"model": name, "task": task.name, "allocation": allocation, **losses}
            for name, subject in zip(models, subjects, strict=True)
            for task in held_out
            for allocation, losses in held_out_losses(subject, task, pruner, config).items()
        ]
    if as_json:
        print_json({"pruner": str(out / "pruner"), "held_out": rows})
        return
    if rows:
        print_table(held_out_table(rows))
    click.echo(f"pruner: {out / 'pruner'}; use it with --scorer smp-plus --pruner {out / 'pruner'}")


def _echo_metrics(metrics: dict[str, float], main: str) -> None:
    for name, value in metrics.items():
        click.echo(f"{name} {value:.4f}" + (" (main metric)" if name == main else ""))
