"""`report` and `demo`, which end in a page to look at."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import Place, command_line, device_option, json_option, out_option, print_json, seed_option
from secateur.support.files import check_new_folder, new_folder


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=Place())
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=Place(dir_okay=False),
    help="The page; one that exists is replaced.",
)
@click.option("--plots", default=None, type=Place(file_okay=False), help="Folder for plots too.")
@click.option("--plot-format", default="svg", show_default=True, type=click.Choice(["svg", "pdf"]))
def report(runs: tuple[Path, ...], out: Path, plots: Path | None, plot_format: str) -> None:
    """Make one HTML page of RUNs: pruned folders, scores files, and folders of comparisons and demos."""
    from secateur.report import write_report
    from secateur.report.reading import read_runs

    found = read_runs(runs)
    drawn: list[Path] = []
    if plots is not None:
        from secateur.report.plots import write_plots

        drawn = write_plots(found, plots, plot_format)
    write_report(found, out)
    click.echo("\n".join([f"report: {out}", *(f"plot: {path}" for path in drawn)]))


@click.command()
@out_option
@seed_option
@device_option
@json_option
def demo(out: Path, seed: int, device: str | None, as_json: bool) -> None:
    """Run the whole path on a real model and real texts from PyPI, and write DIR/report.html."""
    from secateur.cli.tables import demo_table, print_table
    from secateur.demo import run_demo
    from secateur.models.loading import check_device

    check_new_folder(out)
    with new_folder(out) as folder:
        result = run_demo(folder, seed=seed, device=check_device(device), command=command_line())
    if as_json:
        print_json(result)
    else:
        print_table(demo_table(result))
        click.echo(f"report: {out / 'report.html'}\npruned model: {out / 'pruned'}")
