"""`secateur verify`."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import Place, device_option, json_option, print_json


@click.command()
@click.argument("folder", type=Place())
@click.option("--against", default=None, help="The unpruned model [default: the one that the recipe names].")
@device_option
@json_option
def verify(folder: Path, against: str | None, device: str | None, as_json: bool) -> None:
    """Reload the pruned model in FOLDER and compare it with its gated original."""
    from secateur.models.loading import check_device
    from secateur.removal.verify import verify_checkpoint

    result = verify_checkpoint(folder, against, check_device(device))
    if as_json:
        print_json(result)
    else:
        verdict = "equal to" if result["equal"] else "DIFFERS from"
        refitted = " and its output projections refitted" if result["reconstructed"] else ""
        since = ", as it was distilled since" if result["distilled"] else ""
        click.echo(f"{folder} {verdict} {result['against']} with {result['dropped']} units gated{refitted}{since}")
        click.echo(f"largest difference {result['max_difference']:.1e} (at most {result['tolerance']:g} is accepted)")
    if not result["equal"]:
        raise click.exceptions.Exit(1)
