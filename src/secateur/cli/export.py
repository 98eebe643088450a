"""`secateur export`."""

from __future__ import annotations

from pathlib import Path

import click

from secateur.cli.options import json_option, out_option, print_json


@click.command()
@click.argument("folder")
@click.option(
    "--format", "form", required=True, type=click.Choice(["standalone", "onnx"]),
    help="For transformers alone, or for ONNX Runtime.",
)  # fmt: skip
@out_option
@json_option
def export(folder: str, form: str, out: Path, as_json: bool) -> None:
    """Write the model in FOLDER for places without secateur, proved equal to it."""
    from secateur.exporting.export import export_onnx, export_standalone

    result = export_onnx(folder, out) if form == "onnx" else export_standalone(folder, out)
    if as_json:
        print_json({**result, "out": str(out)})
    elif form == "onnx":
        click.echo(f"{result['class']}: opset {result['opset']}, {', '.join(result['inputs'])} [batch, sequence]")
        click.echo(f"largest difference to PyTorch in ONNX Runtime {result['max_difference']:.1e}\ngraph: {out}")
    else:
        click.echo(f"{result['class']}, reloaded bit for bit by the code in {out / result['code']} alone")
        click.echo(f"model: {(out / result['code']).parent} (from_pretrained with trust_remote_code=True)")
