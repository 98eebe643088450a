"""`secateur evaluate`."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.options import echo_metrics, print_json, reading_of, training_options


@click.command()
@click.argument("model")
@training_options
@click.option("--split", default="dev", show_default=True, type=click.Choice(["train", "dev", "test"]))
def evaluate(model: str, data: str, device: str | None, as_json: bool, split: Any, **options: Any) -> None:
    """Evaluate a fine-tuned MODEL, dense or pruned alike, with the task's standard metrics."""
    from transformers import AutoModelForSequenceClassification

    from secateur.finetuning.evaluate import evaluate_model, main_metric
    from secateur.models.loading import check_device, load_model, load_tokenizer
    from secateur.texts.data import load_task

    chosen = check_device(device)
    task = load_task(data, split, need_labels=True)
    loaded = load_model(model, chosen, AutoModelForSequenceClassification, whole=True)
    metrics = evaluate_model(loaded, load_tokenizer(model), task, reading=reading_of(options, progress=True))
    if as_json:
        print_json({"metrics": metrics, "texts": len(task)})
    else:
        echo_metrics(metrics, main_metric(task))
