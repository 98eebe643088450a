"""`secateur bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import Place, command_line, device_option, json_option, print_json
from secateur.support.defaults import BENCHMARK_ROUNDS, BENCHMARK_SHAPES

if TYPE_CHECKING:
    import torch

    from secateur.settings import Shape


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--shape", "shapes", multiple=True, metavar="BATCHxLENGTH",
    help=f"Texts x tokens, such as 8x128; may be repeated [default: {', '.join(BENCHMARK_SHAPES)}].",
)  # fmt: skip
@click.option("--train", is_flag=True, help="Measure training steps too.")
@click.option(
    "--rounds", default=BENCHMARK_ROUNDS, show_default=True, type=click.IntRange(1),
    help="Turns of each model at a shape.",
)  # fmt: skip
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads [default: PyTorch's].")
@click.option(
    "--clock", default="wall", show_default=True, type=click.Choice(["wall", "cpu"]),
    help="cpu: only what this process computes, for --threads 1 on a machine that is busy.",
)  # fmt: skip
@click.option(
    "--table",
    default=None,
    type=Place(dir_okay=False),
    metavar="FILE",
    help="Write instead what the units of one MODEL cost here, for `secateur prune --latency-table FILE`.",
)
@click.option(
    "--runtime",
    default=None,
    type=click.Choice(["pytorch", "onnx", "onnx-int8"]),
    help="What runs the models of a --table [default: pytorch].",
)
@device_option
@json_option
def bench(
    models: tuple[str, ...], shapes: tuple[str, ...], threads: int | None, device: str | None, as_json: bool,
    table: Path | None, runtime: str | None, **options: Any,
) -> None:  # fmt: skip
    """Measure MODELs in turn, the dense one first: latency, memory, and how much of the limit is reached.

    A folder of `secateur export --format onnx` is run by ONNX Runtime: its graph, and the one in int8 if there is one.

    The limit is the ratio of multiply-accumulates of the first model to another's; efficiency is the measured speed-up
    as a share of it. Memory is that of tensors beyond the weights.
    """
    import torch

    from secateur.cli.tables import benchmark_table, print_table
    from secateur.measuring.bench import benchmark
    from secateur.measuring.onnx_graph import graphs_in
    from secateur.models.loading import check_device, load_model
    from secateur.settings import parse_shape

    if len(set(models)) < len(models):
        raise click.UsageError("`MODEL...` must name each model once")
    if runtime is not None and table is None:
        raise click.UsageError("`runtime` must be left out without `--table`; name a folder of exported graphs")
    chosen, wanted = check_device(device), [parse_shape(shape) for shape in shapes or BENCHMARK_SHAPES]
    if threads is not None:
        torch.set_num_threads(threads)
    if table is not None:
        _write_table(models, wanted if shapes else wanted[1:2], table, runtime or "pytorch", chosen, as_json, **options)
        return
    names = [Path(model).name for model in models]
    labels = names if len(set(names)) == len(models) else models
    loaded: dict[str, Any] = {}
    for label, model in zip(labels, models, strict=True):
        graphs = {f"{label} ({runtime})": graph for runtime, graph in graphs_in(model).items()}
        loaded |= graphs or {label: load_model(model, chosen)}
    result = benchmark(loaded, wanted, progress=True, **options)
    if as_json:
        print_json({**result.to_json(), "command": command_line()})
    else:
        print_table(benchmark_table(result))


def _write_table(
    models: Sequence[str], shapes: Sequence[Shape], out: Path, runtime: Any, device: torch.device, as_json: bool, *,
    train: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure what units cost, and write it with the machine that it was measured on."""
    from secateur.exporting.latency import latency_table
    from secateur.measuring.bench import machine_of
    from secateur.models.loading import load_model
    from secateur.support.files import check_can_write, write_text
    from secateur.support.versions import environment

    if len(models) != 1 or len(shapes) != 1 or train:
        raise click.UsageError("`table` must be of one model and one shape, without `--train`")
    check_can_write(out)
    model = load_model(models[0], device)
    found = latency_table(model, shapes[0], runtime, progress=True, **options)
    about = {"kind": "latency_table", "model": models[0], "machine": machine_of(model.device, options["clock"])}
    content = {**about, "versions": environment(), **found.to_json()}
    write_text(out, json.dumps(content, indent=1))
    if as_json:
        print_json(content)
    else:
        click.echo(f"{out}: what {sum(len(kind.sites) for kind in found.kinds)} sites cost at {shapes[0]} in {runtime}")
