"""`secateur reproduce`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import Place, command_line, device_option, json_option, print_json, stoppable
from secateur.reproducing.scales import SCALES
from secateur.support.run_files import COMPARISON, META_TRAINING, NUMBERS, PAGE, ROWS, TABLE

if TYPE_CHECKING:
    from secateur.meta_training.outcomes import Outcome
    from secateur.reproducing.reproduce import Reproduction


@click.command()
@click.option(
    "--scale", default="smoke", show_default=True, type=click.Choice(list(SCALES)),
    help="; ".join(f"{name}: {scale.about.split(';')[0]}" for name, scale in SCALES.items()) + ".",
)  # fmt: skip
@click.option("--model", default=None, help="Another model than the scale's: a folder or a Hub id.")
@click.option(
    "--data", multiple=True,
    help="Another task than the scale's, with train, dev and labels; may be repeated. All are learned and compared on.",
)  # fmt: skip
@click.option(
    "--pruner", default=None, metavar="PLACE",
    help="Meta-pruner in the place of one trained here: a folder, a Hub id, or the authors' file.",
)  # fmt: skip
@click.option("--jobs", default=None, type=click.IntRange(1), help="Runs at once [default: cores; GPUs]")
@click.option("--out", required=True, type=Place(), help="Folder of the reproduction, new or to go on.")
@device_option
@json_option
def reproduce(
    scale: str, model: str | None, data: tuple[str, ...], pruner: str | None, jobs: int | None, out: Path,
    device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Do the paper's experiment: meta-train a pruner, prune by it, fine-tune, and compare; the same command goes on.

    Half of every layer's heads go, chosen by the pruner, at random, and by `contribution`. The table is DIR/results.md.
    """
    from secateur.comparing.summary import not_learned, summarise
    from secateur.meta_training.outcomes import Outcome
    from secateur.models.loading import check_device
    from secateur.report import write_report
    from secateur.report.reading import read_runs
    from secateur.reproducing.reproduce import Reproduction
    from secateur.reproducing.reproduce import reproduce as run_reproduction
    from secateur.support.files import write_text
    from secateur.support.versions import environment

    wanted = Reproduction.of(scale, model, data, pruner)
    with stoppable("what was done stays; the same command goes on"):
        rows = run_reproduction(wanted, out, jobs=jobs, device=check_device(device))
    outcome = Outcome.read(out / META_TRAINING)
    result = {
        "command": command_line(),
        "environment": environment(),
        "reproduction": asdict(wanted),
        "scale": asdict(SCALES[scale]),
        "meta_training": None if outcome is None else asdict(outcome),
        "rows": [asdict(summary) for summary in summarise(rows)],
        "not_learned": not_learned(rows),
    }
    write_text(out / NUMBERS, json.dumps(result, indent=1))
    write_text(out / TABLE, _page(wanted, rows, outcome))
    write_report(read_runs([out / COMPARISON]), out / PAGE)
    if as_json:
        print_json(result)
    else:
        click.echo(
            f"{(out / TABLE).read_text(encoding='utf-8')}\nruns: {out / COMPARISON / ROWS}\nreport: {out / PAGE}"
        )


def _page(wanted: Reproduction, rows: list[dict[str, Any]], outcome: Outcome | None) -> str:
    """Return what was done and what came of it, as Markdown."""
    from secateur.cli.tables import comparison_table, markdown, outcome_table
    from secateur.comparing.summary import not_learned, summarise

    compared = comparison_table(summarise(rows))
    lines = ["# The paper's experiment", "", f"    {command_line()}", "", f"- scale `{wanted.scale}`: "]
    lines[-1] += SCALES[wanted.scale].about
    lines += [f"- model: {wanted.model}", f"- pruner: {wanted.pruner or f'trained here, in {META_TRAINING}'}"]
    lines += [f"- every run: {COMPARISON}/{ROWS}", "", "## After fine-tuning", "", f"{compared.title}", ""]
    lines += [markdown(compared), *(f"\n{line}" for line in not_learned(rows))]
    if outcome is not None:
        learned = outcome_table(outcome)
        lines += ["", "## What the pruner learned", "", f"{learned.title}", "", markdown(learned)]
    return "\n".join(lines) + "\n"
