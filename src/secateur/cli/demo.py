"""`secateur demo`."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import command_line, device_option, json_option, out_option, print_json, seed_option
from secateur.support.files import check_new_folder, new_folder
from secateur.support.run_files import PAGE, PRUNED


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
        click.echo(f"report: {out / PAGE}\nhalf of the model: {out / PRUNED}")
