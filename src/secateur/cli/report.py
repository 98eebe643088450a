"""`secateur report`."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import Place
from secateur.support.files import write_together
from secateur.support.run_files import PAGE


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=Place())
@click.option(
    "--out", default=PAGE, show_default=True, type=Place(dir_okay=False), help="The page; one that exists is replaced."
)
@click.option("--plots", default=None, type=Place(file_okay=False), help="Folder for plots too.")
@click.option("--plot-format", default="svg", show_default=True, type=click.Choice(["svg", "pdf"]))
def report(runs: tuple[Path, ...], out: Path, plots: Path | None, plot_format: str) -> None:
    """Make one HTML page of RUNs: pruned folders, scores files, and folders of comparisons and demos."""
    from secateur.report import render_report
    from secateur.report.reading import read_runs

    found = read_runs(runs)
    drawn: dict[Path, bytes] = {}
    if plots is not None:
        from secateur.report.plots import draw_plots

        drawn = draw_plots(found, plots, plot_format)
    write_together({**drawn, out: render_report(found).encode("utf-8")})
    click.echo("\n".join([f"report: {out}", *(f"plot: {path}" for path in drawn)]))
