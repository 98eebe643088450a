"""`secateur bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import command_line, device_option, json_option, print_json
from secateur.support.defaults import BENCHMARK_ROUNDS, BENCHMARK_SHAPES


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
@device_option
@json_option
def bench(
    models: tuple[str, ...], shapes: tuple[str, ...], threads: int | None, device: str | None, as_json: bool,
    **options: Any,
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
    chosen, wanted = check_device(device), [parse_shape(shape) for shape in shapes or BENCHMARK_SHAPES]
    if threads is not None:
        torch.set_num_threads(threads)
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
