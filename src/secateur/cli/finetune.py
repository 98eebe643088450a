"""`secateur finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Positive,
    bf16_option,
    columns_of,
    echo_metrics,
    out_option,
    print_json,
    reading_of,
    seed_option,
    training_options,
)
from secateur.support.defaults import FINETUNING_EPOCHS, FINETUNING_RATE
from secateur.support.files import check_new_folder


@click.command()
@click.argument("model")
@training_options
@click.option("--epochs", default=FINETUNING_EPOCHS, show_default=True, type=Positive())
@click.option("--learning-rate", default=FINETUNING_RATE, show_default=True, type=Positive())
@click.option("--max-train", default=None, type=click.IntRange(1), help="Training texts at most, drawn with the seed.")
@bf16_option("Train with matrix products")
@seed_option
@out_option
def finetune(
    model: str, data: str, device: str | None, as_json: bool, max_train: int | None, out: Path, **options: Any
) -> None:
    """Fine-tune MODEL, dense or pruned alike, on labelled data with transformers' Trainer."""
    from secateur.finetuning.finetune import finetune as finetune_model
    from secateur.models.loading import check_device
    from secateur.texts.data import has_splits, load_task

    check_new_folder(out)
    reading = reading_of(options, device=str(check_device(device)), progress=True)
    columns = columns_of(options)
    train = load_task(data, "train", need_labels=True, columns=columns)
    dev = load_task(data, "dev", need_labels=True, columns=columns) if has_splits(data) else None
    if max_train is not None:
        train = train.head(max_train, seed=options["seed"])
    _, result = finetune_model(
        model, train, dev, out=out, epochs=options["epochs"], learning_rate=options["learning_rate"], reading=reading
    )
    if as_json:
        print_json({"metrics": result.metrics, "seconds": result.seconds, "steps": result.steps, "out": str(out)})
    else:
        echo_metrics(result.metrics, result.main_metric)
        click.echo(f"{result.steps} steps in {result.seconds:.1f} s\nmodel: {out}")
