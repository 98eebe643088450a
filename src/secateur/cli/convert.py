"""`secateur convert`."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import json_option, out_option, print_json


@click.command()
@click.argument("source")
@out_option
@json_option
def convert(source: str, out: Path, as_json: bool) -> None:
    """Bring SOURCE into today's format: a pruned model of transformers 4, or the paper's authors' meta-pruner."""
    from secateur.exporting.convert import convert as convert_source

    result = convert_source(source, out)
    if as_json:
        print_json({**result, "out": str(out)})
    elif result["kind"] == "model":
        click.echo(f"{result['class']} with {result['kept']} of {result['heads']} heads, reloaded bit for bit")
        click.echo(f"model: {out}")
    else:
        click.echo(f"meta-pruner for `--scorer smp --pruner {out}`")
