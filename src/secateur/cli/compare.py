"""`secateur compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.config_file import config_option
from secateur.cli.options import Place, Ratio, bf16_option, device_option, json_option, print_json, stoppable
from secateur.comparing.protocols import DEFAULT_PROTOCOL, PROTOCOLS
from secateur.scorers import SCORERS
from secateur.support.defaults import COMPARISON_SEEDS, COMPARISON_TEXTS, DISTILLATION_STEPS, PRUNING_RATIO
from secateur.support.run_files import PAGE, ROWS


def _read_pruners(context: click.Context, parameter: click.Parameter, items: tuple[str, ...]) -> dict[str, str]:
    """Split SCORER=PLACE; the settings check the scorers."""
    found: dict[str, str] = {}
    for item in items:
        scorer, equals, place = item.partition("=")
        if not equals or not place or scorer not in SCORERS:
            raise click.UsageError(f"`pruner` must be SCORER=PLACE, such as smp=FOLDER, got {item}")
        if scorer in found:
            raise click.UsageError(f"`pruner` must be given once for each scorer, got {scorer} twice")
        found[scorer] = place
    return found


@click.command()
@config_option
@click.option("--model", required=True, help="Model to prune: a folder or a Hub id.")
@click.option("--data", multiple=True, required=True, help="A task with train and dev, as for prune; may be repeated.")
@click.option(
    "--scorer", "scorers", multiple=True, required=True, type=click.Choice(sorted(SCORERS)), help="May be repeated."
)
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    default=(PRUNING_RATIO,),
    show_default=True,
    type=Ratio(),
    help="May be repeated.",
)
@click.option(
    "--seeds", default=COMPARISON_SEEDS, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, … of each cell."
)
@click.option(
    "--protocol", default=DEFAULT_PROTOCOL, show_default=True, type=click.Choice(list(PROTOCOLS)),
    help="lite: 2,000 training texts of 64 tokens; full: all texts, 128 tokens.",
)  # fmt: skip
@click.option("--allocation", default="uniform", show_default=True, type=click.Choice(["uniform", "ranking"]))
@click.option(
    "--texts", "num_texts", default=COMPARISON_TEXTS, show_default=True, type=click.IntRange(1),
    help="Calibration texts.",
)  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of one run.")
@click.option(
    "--pruner", "pruners", multiple=True, metavar="SCORER=PLACE", callback=_read_pruners,
    help="Meta-pruner of a scorer, such as smp=FOLDER or smp-plus=FOLDER/{task}; may be repeated.",
)  # fmt: skip
@click.option("--max-train", default=None, type=click.IntRange(1), help="Training texts at most, below the protocol's.")
@click.option("--learning-rate", default=None, type=float, help="Instead of the protocol's.")
@click.option("--epochs", default=None, type=float, help="Instead of the protocol's.")
@bf16_option("Train with matrix products")
@click.option(
    "--restore", default="none", show_default=True, type=click.Choice(["none", "reconstruct", "distill"]),
    help="reconstruct: refit what kept heads write on the calibration texts; distill: then also teach the pruned model "
    "what the dense one computes, on all training texts. No labels.",
)  # fmt: skip
@click.option(
    "--steps", default=DISTILLATION_STEPS, show_default=True, type=click.IntRange(1),
    help="Updates of `--restore distill`.",
)  # fmt: skip
@click.option("--jobs", default=None, type=click.IntRange(1), help="Runs at once [default: cores / threads; GPUs]")
@click.option("--out", required=True, type=Place(), help="Folder of the comparison, new or to go on.")
@device_option
@json_option
def compare(out: Path, jobs: int | None, device: str | None, as_json: bool, **settings: Any) -> None:
    """Prune by several scorers, fine-tune, and set the results side by side; stop and go on at any time."""
    from dataclasses import asdict

    from secateur.cli.tables import comparison_table, print_table
    from secateur.comparing.compare import compare as run_comparison
    from secateur.comparing.compare import default_jobs
    from secateur.comparing.plan import Settings
    from secateur.comparing.summary import not_learned, summarise
    from secateur.models.loading import check_device
    from secateur.report import write_report
    from secateur.report.reading import read_runs

    chosen = check_device(device)
    found = Settings(**settings)
    with stoppable("the runs that had finished stay; the same command goes on"):
        rows = run_comparison(found, out, jobs=jobs or default_jobs(chosen, found.threads), device=str(chosen))
    summaries = summarise(rows)
    write_report(read_runs([out]), out / PAGE)
    if as_json:
        print_json([asdict(summary) for summary in summaries])
    else:
        print_table(comparison_table(summaries))
        for line in not_learned(rows):
            click.echo(line)
        click.echo(f"runs: {out / ROWS}\nreport: {out / PAGE}")
