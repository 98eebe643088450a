"""`secateur evaluate`."""

from __future__ import annotations

from typing import Any

import click

from secateur.cli.options import columns_of, echo_metrics, print_json, reading_of, training_options


@click.command()
@click.argument("model")
@training_options
@click.option("--split", default="dev", show_default=True, type=click.Choice(["train", "dev", "test"]))
def evaluate(model: str, data: str, device: str | None, as_json: bool, split: Any, **options: Any) -> None:
    """Evaluate a fine-tuned MODEL, dense or pruned alike, with the task's standard metrics.

    An encoder that was not fine-tuned is evaluated on pairs of texts with scores (`label` with a decimal point), by the
    cosines of its embeddings.
    """
    from transformers import AutoModelForSequenceClassification

    from secateur.finetuning.evaluate import evaluate_model, main_metric
    from secateur.finetuning.similarity import evaluate_similarity
    from secateur.models.loading import check_device, has_no_head, load_model, load_tokenizer
    from secateur.models.sentence_transformers import pooling_of
    from secateur.texts.data import load_task

    chosen = check_device(device)
    task = load_task(data, split, need_labels=True, columns=columns_of(options))
    reading, about = reading_of(options, progress=True), {}
    if task.is_pair and task.is_regression and has_no_head(model):
        pooling = pooling_of(model)
        about = {"measured": "cosine similarity of embeddings, no trained head", "pooling": " and ".join(pooling)}
        encoder = load_model(model, chosen, whole=True)
        metrics = evaluate_similarity(encoder, load_tokenizer(model), task, pooling, reading=reading)
    else:
        loaded = load_model(model, chosen, AutoModelForSequenceClassification, whole=True)
        metrics = evaluate_model(loaded, load_tokenizer(model), task, reading=reading)
    if as_json:
        print_json({"metrics": metrics, "texts": len(task), **about})
        return
    for name, value in about.items():
        click.echo(f"{name}: {value}")
    echo_metrics(metrics, main_metric(task))
