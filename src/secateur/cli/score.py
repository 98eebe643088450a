"""`secateur score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import Place, data_option, json_option, print_json, reading_of
from secateur.cli.scoring import calibration_of, ends_as_main, processes, scorer_of, scoring_options, settled
from secateur.support.files import check_can_write


@click.command()
@click.argument("model")
@data_option
@scoring_options
@click.option("--out", type=Place(dir_okay=False), help="Write the scores to this JSON file.")
@json_option
def score(model: str, data: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score the units of MODEL, its heads unless told otherwise, on a task's texts; some scorers need labels too.

    Under `accelerate launch` or torchrun each process scores a share of the texts. `--device auto` is for a model that
    is larger than a GPU: it is spread over GPUs, memory and disk (`device_map="auto"`).
    """
    from secateur.cli.tables import neurons_table, print_table, scores_table
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.scorers.score import score as score_model

    if out is not None and out.parent != Path() and not out.parent.is_dir():
        raise click.ClickException(f"`out` must lie in a folder that exists, got {out}")
    if out is not None:
        check_can_write(out)
    accelerator, device = processes(options["device"])
    scorer = scorer_of(options)
    texts, labels = calibration_of(data, options)
    reading = reading_of(options, accelerator=accelerator, progress=accelerator.is_main_process)
    loaded = load_model(model, device)
    units = options["units"] or ("heads",)
    scores = score_model(
        loaded, texts, scorer, load_tokenizer(model), units=units, labels=labels, reading=reading
    )  # fmt: skip
    if not ends_as_main(accelerator):
        return
    if scores.agreement is not None:
        click.echo(settled(scores.num_texts, texts, scores.agreement), err=True)
    if out is not None:
        scores.save(out)
        click.echo(f"scores of {len(scores)} sites: {out}", err=True)
    if as_json:
        print_json(scores.to_json())
    elif out is None:
        print_table(scores_table(scores))
        if "neurons" in scores.kinds.values():
            print_table(neurons_table(scores))
