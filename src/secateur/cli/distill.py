"""`secateur distill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Positive,
    bf16_option,
    columns_of,
    out_option,
    print_json,
    reading_of,
    seed_option,
    training_options,
)
from secateur.support.defaults import DISTILLATION_RATE, DISTILLATION_STEPS
from secateur.support.files import check_new_folder
from secateur.support.run_files import DISTILLATION, PAGE, PRUNING


@click.command()
@click.argument("model")
@training_options
@click.option("--against", default=None, help="The unpruned model, which teaches [default: the one MODEL names].")
@click.option(
    "--steps", default=DISTILLATION_STEPS, show_default=True, type=click.IntRange(1), help="Optimiser updates."
)
@click.option("--learning-rate", default=DISTILLATION_RATE, show_default=True, type=Positive())
@click.option(
    "--texts", "num_texts", default=None, type=click.IntRange(1), help="Texts, drawn with the seed [default: all]."
)
@bf16_option("Train with matrix products")
@seed_option
@out_option
def distill(
    model: str, data: str, device: str | None, as_json: bool, against: str | None, num_texts: int | None, out: Path,
    **options: Any,
) -> None:  # fmt: skip
    """Teach the pruned MODEL what the unpruned one computes, on texts without labels, before it is fine-tuned."""
    from secateur.models.loading import check_device, load_model, load_tokenizer
    from secateur.models.model_saving import save_model
    from secateur.removal.verify import load_original
    from secateur.report import write_report
    from secateur.report.pruning_files import copy_pruning
    from secateur.report.reading import read_runs
    from secateur.report.relational_kl import distillation_line
    from secateur.restoring.distillation import distill_
    from secateur.settings import said_of
    from secateur.support.files import new_folder, write_text
    from secateur.texts.data import load_task

    check_new_folder(out)
    chosen = check_device(device)
    task = load_task(data, "train", columns=columns_of(options))
    texts = task.head(num_texts or len(task), seed=options["seed"]).texts
    pruned, tokenizer = load_model(model, chosen), load_tokenizer(model)
    teacher, name = load_original(pruned, model, against, chosen)
    has_page = (Path(model) / PRUNING).is_file()
    if has_page:
        read_runs([model])  # refuses what makes no page before the training, whose result would be lost
    training = {key: options[key] for key in ("steps", "learning_rate")}
    reading = reading_of(options, progress=True)
    with new_folder(out) as folder:
        before, after = distill_(pruned, teacher, texts, tokenizer, **training, reading=reading)
        save_model(pruned, tokenizer, model, folder)
        about = {
            "model": model, "teacher": name, "texts": len(texts), **training, **said_of(reading),
            "relational_kl": [before, after],
        }  # fmt: skip
        write_text(folder / DISTILLATION, json.dumps(about, indent=1))
        copy_pruning(model, folder)  # what `prune` wrote of the heads holds on: distillation leaves them where they are
        if has_page:
            write_report(read_runs([folder]), folder / PAGE)
    if as_json:
        print_json({**about, "out": str(out)})
    else:
        page = f"\nreport: {out / PAGE}" if has_page else ""
        click.echo(f"{distillation_line(before, after, options['steps'])}\nmodel: {out}{page}")
