"""`secateur export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from secateur.cli.options import json_option, out_option, print_json


@click.command()
@click.argument("folder")
@click.option(
    "--format", "form", required=True, type=click.Choice(["standalone", "onnx"]),
    help="For transformers alone, or for ONNX Runtime.",
)  # fmt: skip
@click.option(
    "--quantize", default=None, type=click.Choice(["int8"]),
    help="With --format onnx: a second graph with weights in int8, for CPUs.",
)  # fmt: skip
@out_option
@json_option
def export(folder: str, form: str, quantize: Literal["int8"] | None, out: Path, as_json: bool) -> None:
    """Write the model in FOLDER for places without secateur, proved equal to it."""
    from secateur.exporting.export import export_onnx, export_standalone

    if quantize and form != "onnx":
        raise click.UsageError("`--quantize` needs `--format onnx`")
    result = export_onnx(folder, out, quantize) if form == "onnx" else export_standalone(folder, out)
    if as_json:
        print_json({**result, "out": str(out)})
    elif form == "onnx":
        click.echo(f"{result['class']}: opset {result['opset']}, {', '.join(result['inputs'])} [batch, sequence]")
        click.echo(f"largest difference to PyTorch in ONNX Runtime {result['max_difference']:.1e}")
        if quantize:
            _echo_int8(result["int8"])
        click.echo(f"graph: {(out / result['file']).parent}")
    else:
        click.echo(f"{result['class']}, reloaded bit for bit by the code in {out / result['code']} alone")
        click.echo(f"model: {(out / result['code']).parent} (from_pretrained with trust_remote_code=True)")


def _echo_int8(found: dict[str, Any]) -> None:
    size, whole = found["bytes"] / 1e6, found["float_bytes"] / 1e6
    click.echo(f"int8: {size:.1f} MB of {whole:.1f}, {found['time']:.2f} of the time (8x128 tokens, ONNX Runtime here)")
    click.echo(f"mean cosine of int8 to PyTorch {found['cosine']:.4f}")
