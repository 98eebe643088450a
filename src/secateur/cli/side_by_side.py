"""`compare` and `bench`: what is seen side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Place,
    Ratio,
    bf16_option,
    command_line,
    device_option,
    json_option,
    print_json,
    stoppable,
)
from secateur.scorers import SCORERS
from secateur.support.defaults import COMPARISON_TEXTS, DISTILLATION_STEPS


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Take the values of a YAML file for the flags that are not given; click checks them as it checks flags."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is no YAML: {error}") from None
    flags = {
        o.opts[0].lstrip("-"): o for o in context.command.params if isinstance(o, click.Option) and o is not parameter
    }
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise click.BadParameter(f"{path} must hold `flag: value` lines")
    if unknown := sorted(set(values) - set(flags)):
        raise click.BadParameter(f"{path} has {', '.join(unknown)}, which is none of {', '.join(sorted(flags))}")
    named = {}
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not parts or any(part is None or isinstance(part, list | dict) for part in parts):
            raise click.BadParameter(f"{path}: `{name}` must have a value, or a list of values, got {value}")
        many = isinstance(value, list)
        named[flags[name].name] = value if many or not flags[name].multiple else [value]
    context.default_map = named
    return path


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
@click.option(
    "--config",
    default=None,
    is_eager=True,
    callback=_read_config,
    expose_value=False,
    type=Place(exists=True, dir_okay=False),
    help="YAML file with the flags below, less the dashes.",
)
@click.option("--model", required=True, help="Model to prune: a folder or a Hub id.")
@click.option("--data", multiple=True, required=True, help="A task with train and dev, as for prune; may be repeated.")
@click.option(
    "--scorer", "scorers", multiple=True, required=True, type=click.Choice(sorted(SCORERS)), help="May be repeated."
)
@click.option(
    "--ratio", "ratios", multiple=True, default=(0.5,), show_default=True, type=Ratio(), help="May be repeated."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, … of each cell.")
@click.option(
    "--protocol",
    default="lite",
    show_default=True,
    type=click.Choice(["lite", "full"]),
    help="lite: 2,000 training texts of 64 tokens; full: all texts, 128 tokens.",
)
@click.option("--allocation", default="uniform", show_default=True, type=click.Choice(["uniform", "ranking"]))
@click.option(
    "--texts",
    "num_texts",
    default=COMPARISON_TEXTS,
    show_default=True,
    type=click.IntRange(1),
    help="Calibration texts.",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads of one run.")
@click.option(
    "--pruner",
    "pruners",
    multiple=True,
    metavar="SCORER=PLACE",
    callback=_read_pruners,
    help="Meta-pruner of a scorer, such as smp=FOLDER or smp-plus=FOLDER/{task}; may be repeated.",
)
@click.option("--max-train", default=None, type=click.IntRange(1), help="Training texts at most, below the protocol's.")
@click.option("--learning-rate", default=None, type=float, help="Instead of the protocol's.")
@click.option("--epochs", default=None, type=float, help="Instead of the protocol's.")
@bf16_option
@click.option(
    "--restore", default="none", show_default=True, type=click.Choice(["none", "reconstruct", "distill"]),
    help="reconstruct: refit what kept heads write on the calibration texts; distill: then also teach the pruned model "
    "what the dense one computes, on all training texts. No labels.",
)  # fmt: skip
@click.option(
    "--steps",
    default=DISTILLATION_STEPS,
    show_default=True,
    type=click.IntRange(1),
    help="Updates of `--restore distill`.",
)
@click.option("--jobs", default=None, type=click.IntRange(1), help="Runs at once [default: cores / threads; GPUs]")
@click.option("--out", required=True, type=Place(), help="Folder of the comparison, new or to go on.")
@device_option
@json_option
def compare(out: Path, jobs: int | None, device: str | None, as_json: bool, **settings: Any) -> None:
    """Prune by several scorers, fine-tune, and set the results side by side; stop and go on at any time."""
    from dataclasses import asdict

    from secateur.cli.tables import comparison_table, print_table
    from secateur.comparing.compare import Settings, default_jobs
    from secateur.comparing.compare import compare as run_comparison
    from secateur.comparing.summary import summarise
    from secateur.models.loading import check_device
    from secateur.report import write_report
    from secateur.report.reading import read_runs

    chosen = check_device(device)
    found = Settings(**settings)
    with stoppable("the runs that had finished stay; the same command goes on"):
        rows = run_comparison(found, out, jobs=jobs or default_jobs(chosen, found.threads), device=str(chosen))
    summaries = summarise(rows)
    write_report(read_runs([out]), out / "report.html")
    if as_json:
        print_json([asdict(summary) for summary in summaries])
    else:
        print_table(comparison_table(summaries))
        click.echo(f"runs: {out / 'runs.jsonl'}\nreport: {out / 'report.html'}")


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="BATCHxLENGTH",
    help="Texts x tokens, such as 8x128; may be repeated [default: 1x128, 8x128, 1x512].",
)
@click.option("--train", is_flag=True, help="Measure training steps too.")
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(1), help="Turns of each model at a shape.")
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads [default: PyTorch's].")
@click.option(
    "--clock",
    default="wall",
    show_default=True,
    type=click.Choice(["wall", "cpu"]),
    help="cpu: only what this process computes, for --threads 1 on a machine that is busy.",
)
@device_option
@json_option
def bench(
    models: tuple[str, ...], shapes: tuple[str, ...], train: bool, rounds: int, threads: int | None, clock: Any,
    device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODELs in turn, the dense one first: latency, memory, and how much of the limit is reached.

    The limit is the ratio of multiply-accumulates of the first model to another's; efficiency is the measured speed-up
    as a share of it. Memory is that of tensors beyond the weights.
    """
    import torch

    from secateur.cli.tables import benchmark_table, print_table
    from secateur.measuring.bench import SHAPES, benchmark
    from secateur.models.loading import check_device, load_model
    from secateur.settings import parse_shape

    if len(set(models)) < len(models):
        raise click.UsageError("`MODEL...` must name each model once")
    chosen, wanted = check_device(device), [parse_shape(shape) for shape in shapes] or SHAPES
    if threads is not None:
        torch.set_num_threads(threads)
    names = [Path(model).name for model in models]
    labels = names if len(set(names)) == len(models) else models
    loaded = {label: load_model(model, chosen) for label, model in zip(labels, models, strict=True)}
    result = benchmark(loaded, wanted, rounds=rounds, train=train, clock=clock, progress=True)
    if as_json:
        print_json({**result.to_json(), "command": command_line()})
    else:
        print_table(benchmark_table(result))
