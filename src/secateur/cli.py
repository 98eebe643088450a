"""The commands. Each is thin: it checks, calls the library, and prints results to stdout, progress to stderr.

Nothing heavy is imported here, so that `--help` answers at once; every command imports what it needs.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur import __version__
from secateur.checks import LARGEST_SEED
from secateur.errors import SecateurError, SecateurWarning
from secateur.files import check_can_write, check_new_folder, is_taken, new_folder
from secateur.scorers import DEFAULT_SCORER, SCORERS, make_scorer, scorer_class

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from secateur.data import Text
    from secateur.scorers.base import Scorer

_CALIBRATION_TEXTS = 256


class _Ratio(click.ParamType):
    """A fraction in [0, 1)."""

    name = "ratio"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail in the one error form."""
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < 1:
            self.fail(f"`{param.name if param else 'ratio'}` must be in [0, 1), got {value}", param, ctx)
        return number


class _Stop(click.ParamType):
    """`all`, `auto`, or how many texts."""

    name = "all|auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word or the number, or fail in the one error form."""
        if value in ("all", "auto"):
            return value
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"`stop` must be all, auto or a whole number from 1, got {value}", param, ctx)
        return int(value)


class _Positive(click.ParamType):
    """A finite number above 0; click's own range lets NaN through."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail in the one error form."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 < number < float("inf"):
            self.fail(f"`{param.name if param else 'value'}` must be a number above 0, got {value}", param, ctx)
        return number


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Join several click options into one decorator."""
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
_device = click.option("--device", default=None, help="cpu, cuda, cuda:1 … [default: a GPU where there is one]")
_seed = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, LARGEST_SEED), help="Seed of everything random."
)
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="New or empty folder for the result.")
_length = click.option("--max-length", default=128, show_default=True, type=click.IntRange(4), help="Tokens a text.")
_data = click.option(
    "--data", required=True, help="Texts: a file (csv, tsv, jsonl, parquet), a folder with train and dev, or a Hub id."
)
_scoring = _options(
    click.option(
        "--scorer", default=DEFAULT_SCORER, show_default=True, type=click.Choice(sorted(SCORERS)), help="Criterion."
    ),
    click.option(
        "--option", "scorer_options", multiple=True, metavar="NAME=VALUE",
        help="An option of the scorer, such as warmup_epochs=1; may be repeated.",
    ),
    click.option("--pruner", default=None, help="Meta-pruner of smp, smp-plus: folder, Hub id, the authors' .bin."),
    click.option("--split", default="train", show_default=True, type=click.Choice(["train", "dev", "test"])),
    click.option(
        "--texts", "num_texts", default=None, type=click.IntRange(1),
        help=f"Calibration texts, drawn from the data with the seed [default: {_CALIBRATION_TEXTS}; all with --stop].",
    ),
    click.option(
        "--stop", default="all", show_default=True, type=_Stop(),
        help="Score all of them, a number, or, in random order, as many as it takes until the heads to keep settle.",
    ),
    click.option(
        "--stream", is_flag=True,
        help="Read the data one batch after the other, shuffled among the next 10,000 texts; shards by a pattern too.",
    ),
    click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Texts a batch."),
    _length,
    _seed,
    _device,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="secateur")
def cli() -> None:
    """Remove attention heads that a task does not need from a pre-trained Transformer, and prove the result."""


@cli.command()
@click.argument("model")
@_device
@_json
def info(model: str, device: str | None, as_json: bool) -> None:
    """Show MODEL's attention sites, heads, parameters, multiply-accumulates, and whether heads can be removed."""
    from secateur.errors import UnsupportedModelError
    from secateur.model.cost import count_parameters, measure_cost
    from secateur.model.loading import check_device, load_model
    from secateur.model.sites import find_sites
    from secateur.tables import info_table, print_table

    loaded = load_model(model, check_device(device))
    facts: dict[str, Any] = {"model": model, "class": type(loaded).__name__, "parameters": count_parameters(loaded)}
    try:
        sites = find_sites(loaded)
        facts |= {"prunable": True, "cost": measure_cost(loaded).to_json()}
        facts["sites"] = [
            {
                "name": site.name,
                "heads": site.num_heads,
                "key_value_heads": site.num_key_value_heads,
                "original_heads": site.original_num_heads,
            }
            for site in sites.values()
        ]
    except UnsupportedModelError as error:
        facts |= {"prunable": False, "reason": str(error)}
    if as_json:
        _print_json(facts)
    else:
        print_table(info_table(facts))


@cli.command()
@click.argument("model")
@_data
@_scoring
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the scores to this JSON file.")
@_json
def score(model: str, data: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score every attention head of MODEL on a task's texts; some scorers need their labels too.

    Under `accelerate launch` or torchrun each process scores a share of the texts. `--device auto` is for a model that
    is larger than a GPU: it is spread over GPUs, memory and disk (`device_map="auto"`).
    """
    from secateur.errors import invalid
    from secateur.model.loading import load_model, load_tokenizer
    from secateur.pruning import score_heads
    from secateur.tables import print_table, scores_table

    if out is not None and out.parent != Path() and not out.parent.is_dir():
        raise click.ClickException(f"`out` must lie in a folder that exists, got {out}")
    if out is not None:
        check_can_write(out.parent)
    spread = options["device"] == "auto"
    accelerator, device = _processes(None if spread else options["device"])
    if spread and accelerator.num_processes > 1:
        raise invalid("device", "be one of its own for each process that a launcher started", "auto")
    scorer = _scorer(options)
    texts, labels = _calibration(data, options)
    scores = score_heads(
        load_model(model, device, **({"device_map": "auto"} if spread else {})),
        texts,
        scorer,
        load_tokenizer(model),
        labels=labels,
        batch_size=options["batch_size"],
        max_length=options["max_length"],
        seed=options["seed"],
        stop=options["stop"],
        accelerator=accelerator,
        progress=accelerator.is_main_process,
    )
    if not _ends_as_main(accelerator):
        return
    if scores.agreement is not None:
        click.echo(_settled(scores.num_texts, texts, scores.agreement), err=True)
    if out is not None:
        scores.save(out)
        click.echo(f"scores of {len(scores)} sites: {out}", err=True)
    if as_json:
        _print_json(scores.to_json())
    elif out is None:
        print_table(scores_table(scores))


@cli.command()
@click.argument("model")
@_data
@click.option("--ratio", default=0.5, show_default=True, type=_Ratio(), help="Fraction of heads to remove, in [0, 1).")
@click.option(
    "--budget",
    default=None,
    metavar="QUANTITY=SHARE",
    help="Instead of a ratio, what may remain: heads=0.5, params=0.95, macs=0.85, latency=0.8x@8x128.",
)
@click.option(
    "--scope", default="site", show_default=True, type=click.Choice(["site", "global"]),
    help="The same ratio at every site, or one ranking over the model.",
)  # fmt: skip
@click.option("--min-heads", default=1, show_default=True, type=click.IntRange(0), help="Heads a site keeps at least.")
@click.option(
    "--refine",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Exchanges of heads to try on the texts after scoring, no labels; each takes a pass.",
)
@click.option("--maps/--no-maps", default=True, show_default=True, help="Keep mean attention maps for the report page.")
@_scoring
@_out
@_json
@click.pass_context
def prune(
    context: click.Context, model: str, data: str, ratio: float, budget: str | None, scope: Any, min_heads: int,
    refine: int, maps: bool, out: Path, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Score MODEL's heads, remove the lowest, prove the result, and save it as an ordinary model folder.

    Under `accelerate launch` or torchrun each process scores a share of the texts, and the first one saves.
    """
    from dataclasses import replace

    from secateur.budget import Budget
    from secateur.model.loading import load_tokenizer
    from secateur.pruning import prune as prune_model
    from secateur.report import write_report
    from secateur.report.runs import ATTENTION_MAPS, PRUNING, read_runs
    from secateur.sentence import copy_modules
    from secateur.tables import print_table, pruning_table

    accelerator, device = _processes(options["device"])
    if accelerator.is_main_process:
        check_new_folder(out)
    if budget is not None and context.get_parameter_source("ratio") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("`ratio` must be left out where there is a `--budget`")
    wanted = None if budget is None else Budget.parse(budget)
    scorer = _scorer(options)
    texts, labels = _calibration(data, options)
    tokenizer = load_tokenizer(model)
    # Of the processes that a launcher started, the first one holds the folder and saves.
    with new_folder(out) if accelerator.is_main_process else nullcontext(out) as folder:
        pruned, report = prune_model(
            model,
            texts,
            ratio,
            budget=wanted,
            scorer=scorer,
            scope=scope,
            min_heads=min_heads,
            stop=options["stop"],
            refine=refine,
            tokenizer=tokenizer,
            labels=labels,
            batch_size=options["batch_size"],
            max_length=options["max_length"],
            seed=options["seed"],
            device=str(device),
            maps=maps,
            accelerator=accelerator,
            progress=accelerator.is_main_process,
        )
        if not _ends_as_main(accelerator):
            return
        report = replace(report, command=_command_line())
        place = copy_modules(model, folder)
        pruned.save_pretrained(place)
        tokenizer.save_pretrained(place)
        report.save(folder / PRUNING)
        if report.attention_maps is not None:
            report.attention_maps.save(folder / ATTENTION_MAPS)
        write_report(read_runs([folder]), folder / "report.html")
    if as_json:
        _print_json({**report.to_json(), "out": str(out)})
    else:
        print_table(pruning_table(report))
        click.echo(f"{report}\nproof: largest difference to the gated model {report.max_difference:.1e}")
        if report.agreement is not None:
            click.echo(_settled(report.num_texts, texts, report.agreement))
        if report.refinement:
            first, best = report.refinement[0], min(report.refinement)
            click.echo(f"relational KL on these texts {first:.4f}, after {refine} exchanges {best:.4f}")
        click.echo(f"model: {out}\nreport: {out / 'report.html'}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", default=None, help="The unpruned model [default: the one that the recipe names].")
@_device
@_json
def verify(folder: Path, against: str | None, device: str | None, as_json: bool) -> None:
    """Reload the pruned model in FOLDER and compare it with its gated original."""
    from secateur.model.loading import check_device
    from secateur.verify import verify_checkpoint

    result = verify_checkpoint(folder, against, check_device(device))
    if as_json:
        _print_json(result)
    else:
        verdict = "equal to" if result["equal"] else "DIFFERS from"
        click.echo(f"{folder} {verdict} {result['against']} with {result['dropped']} heads gated")
        click.echo(f"largest difference {result['max_difference']:.1e} (at most {result['tolerance']:g} is accepted)")
    if not result["equal"]:
        raise click.exceptions.Exit(1)


@cli.command()
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
@_device
@_json
def bench(
    models: tuple[str, ...], shapes: tuple[str, ...], train: bool, rounds: int, threads: int | None, clock: Any,
    device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure MODELs in turn, the dense one first: latency, memory, and how much of the limit is reached.

    The limit is the ratio of multiply-accumulates of the first model to another's; efficiency is the measured speed-up
    as a share of it. Memory is that of tensors beyond the weights.
    """
    import torch

    from secateur.bench import SHAPES, benchmark
    from secateur.model.loading import check_device, load_model
    from secateur.model.timing import parse_shape
    from secateur.tables import benchmark_table, print_table

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
        _print_json({**result.to_json(), "command": _command_line()})
    else:
        print_table(benchmark_table(result))


_bf16 = click.option(
    "--bf16", is_flag=True, help="Train with matrix products in bfloat16: faster where the device has it."
)
_training = _options(
    _data,
    click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Texts a batch."),
    _length,
    _device,
    _json,
)


@cli.command()
@click.argument("model")
@_training
@click.option("--epochs", default=3.0, show_default=True, type=_Positive())
@click.option("--learning-rate", default=2e-5, show_default=True, type=_Positive())
@click.option("--max-train", default=None, type=click.IntRange(1), help="Training texts at most, drawn with the seed.")
@_bf16
@_seed
@_out
def finetune(
    model: str, data: str, batch_size: int, max_length: int, device: str | None, as_json: bool, epochs: float,
    learning_rate: float, max_train: int | None, bf16: bool, seed: int, out: Path,
) -> None:  # fmt: skip
    """Fine-tune MODEL, dense or pruned alike, on labelled data with transformers' Trainer."""
    from secateur.data import load_task
    from secateur.finetune import finetune as finetune_model
    from secateur.model.loading import check_device

    check_new_folder(out)
    chosen = check_device(device)
    train = load_task(data, "train", need_labels=True)
    dev = load_task(data, "dev", need_labels=True) if not Path(data).is_file() else None
    if max_train is not None:
        train = train.head(max_train, seed=seed)
    _, result = finetune_model(
        model, train, dev, out=out, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
        max_length=max_length, seed=seed, bf16=bf16, device=str(chosen),
    )  # fmt: skip
    if as_json:
        _print_json({"metrics": result.metrics, "seconds": result.seconds, "steps": result.steps, "out": str(out)})
    else:
        _echo_metrics(result.metrics, result.main_metric)
        click.echo(f"{result.steps} steps in {result.seconds:.1f} s\nmodel: {out}")


@cli.command()
@click.argument("model")
@_training
@click.option("--split", default="dev", show_default=True, type=click.Choice(["train", "dev", "test"]))
def evaluate(
    model: str, data: str, batch_size: int, max_length: int, device: str | None, as_json: bool, split: Any
) -> None:
    """Evaluate a fine-tuned MODEL, dense or pruned alike, with the task's standard metrics."""
    from transformers import AutoModelForSequenceClassification

    from secateur.data import load_task
    from secateur.evaluate import evaluate_model, main_metric
    from secateur.model.loading import check_device, load_model, load_tokenizer

    chosen = check_device(device)
    task = load_task(data, split, need_labels=True)
    loaded = load_model(model, chosen, AutoModelForSequenceClassification)
    metrics = evaluate_model(loaded, load_tokenizer(model), task, batch_size=batch_size, max_length=max_length)
    if as_json:
        _print_json({"metrics": metrics, "texts": len(task)})
    else:
        _echo_metrics(metrics, main_metric(task))


@cli.command("meta-train")
@click.option("--model", "models", multiple=True, required=True, help="Frozen model to learn on; may be repeated.")
@click.option("--data", "data", multiple=True, required=True, help="A task, as for prune; may be repeated.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for log, checkpoints and pruner.")
@click.option("--resume", is_flag=True, help="Continue the newest checkpoint in `--out`.")
@click.option("--steps", default=6000, show_default=True, type=click.IntRange(1), help="Optimiser updates.")
@click.option("--batch-size", default=60, show_default=True, type=click.IntRange(2), help="Texts a batch.")
@click.option("--batches-per-step", default=8, show_default=True, type=click.IntRange(1))
@click.option("--learning-rate", default=0.02, show_default=True, type=_Positive())
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice(["sgd", "adam"]))
@click.option("--ratio", "pruning_ratio", default=0.5, show_default=True, type=_Ratio())
@click.option(
    "--signal",
    default="straight_through",
    show_default=True,
    type=click.Choice(["straight_through", "leave_one_out", "random_masks"]),
    help="What teaches the pruner; the first is the paper's.",
)
@click.option(
    "--pool", default=0, show_default=True, type=click.IntRange(0), help="Batches a task drawn again; 0 = fresh."
)
@click.option("--temperature", default=1.0, show_default=True, type=_Positive())
@click.option("--evaluate-every", default=100, show_default=True, type=click.IntRange(1))
@click.option("--checkpoint-every", default=100, show_default=True, type=click.IntRange(1))
@click.option("--max-minutes", default=None, type=_Positive(), help="Stop there, resumable.")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, in `--out`.")
@_length
@_seed
def meta_train(
    models: tuple[str, ...], data: tuple[str, ...], out: Path, resume: bool, max_minutes: float | None,
    tensorboard: bool, **settings: Any,
) -> None:  # fmt: skip
    """Meta-train a pruner on the unlabelled texts of several tasks; run it under `accelerate launch` to share the work.

    A task's dev texts, where it has some, judge the run: the log holds the relational KL of the mask they get.
    """
    from accelerate import Accelerator

    from secateur.data import load_task
    from secateur.errors import InvalidInputError, invalid
    from secateur.meta.config import MetaTrainingConfig
    from secateur.meta.runs import latest_checkpoint
    from secateur.meta.training import HeldOut, Subject, train_meta_pruner
    from secateur.model.loading import load_model, load_tokenizer

    config = MetaTrainingConfig(**settings)
    if resume and latest_checkpoint(out) is None and not (out / "log.jsonl").is_file():
        raise InvalidInputError(f"there is no checkpoint to resume in {out}")
    accelerator = Accelerator(log_with="tensorboard" if tensorboard else None, project_dir=str(out))
    if not resume and accelerator.is_main_process and is_taken(out):
        raise invalid("out", "be a new or empty folder", str(out), "go on with --resume, or choose another folder")
    tasks = [load_task(d, "train") for d in data]
    held_out = [HeldOut(load_task(d, "dev")) for d in data if not Path(d).is_file()]
    subjects = [Subject(load_model(m, accelerator.device), load_tokenizer(m)) for m in models]
    with _stoppable(f"the checkpoints in {out} stay; go on with --resume"):
        train_meta_pruner(
            subjects, tasks, out, config, held_out=held_out, resume=resume, accelerator=accelerator,
            stop_after=None if max_minutes is None else 60 * max_minutes,
        )  # fmt: skip
    if accelerator.is_main_process:
        finished = (out / "pruner").is_dir()
        click.echo(f"pruner: {out / 'pruner'}" if finished else f"stopped at {latest_checkpoint(out)}; go on: --resume")


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


@cli.command()
@click.option(
    "--config",
    default=None,
    is_eager=True,
    callback=_read_config,
    expose_value=False,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML file with the flags below, less the dashes.",
)
@click.option("--model", required=True, help="Model to prune: a folder or a Hub id.")
@click.option("--data", multiple=True, required=True, help="A task with train and dev, as for prune; may be repeated.")
@click.option(
    "--scorer", "scorers", multiple=True, required=True, type=click.Choice(sorted(SCORERS)), help="May be repeated."
)
@click.option(
    "--ratio", "ratios", multiple=True, default=(0.5,), show_default=True, type=_Ratio(), help="May be repeated."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds 0, 1, … of each cell.")
@click.option(
    "--protocol",
    default="lite",
    show_default=True,
    type=click.Choice(["lite", "full"]),
    help="lite: 2,000 training texts of 64 tokens; full: all texts, 128 tokens.",
)
@click.option("--scope", default="site", show_default=True, type=click.Choice(["site", "global"]))
@click.option("--texts", "num_texts", default=96, show_default=True, type=click.IntRange(1), help="Calibration texts.")
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
@_bf16
@click.option("--jobs", default=None, type=click.IntRange(1), help="Runs at once [default: cores / threads; GPUs]")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the comparison, new or to go on."
)
@_device
@_json
def compare(out: Path, jobs: int | None, device: str | None, as_json: bool, **settings: Any) -> None:
    """Prune by several scorers, fine-tune, and set the results side by side; stop and go on at any time."""
    from dataclasses import asdict

    from secateur.compare import Settings, default_jobs
    from secateur.compare import compare as run_comparison
    from secateur.model.loading import check_device
    from secateur.report import write_report
    from secateur.report.runs import read_runs
    from secateur.summary import summarise
    from secateur.tables import comparison_table, print_table

    chosen = check_device(device)
    found = Settings(**settings)
    with _stoppable("the runs that had finished stay; the same command goes on"):
        rows = run_comparison(found, out, jobs=jobs or default_jobs(chosen, found.threads), device=str(chosen))
    summaries = summarise(rows)
    write_report(read_runs([out]), out / "report.html")
    if as_json:
        _print_json([asdict(summary) for summary in summaries])
    else:
        print_table(comparison_table(summaries))
        click.echo(f"runs: {out / 'runs.jsonl'}\nreport: {out / 'report.html'}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page; one that exists is replaced.",
)
@click.option("--plots", default=None, type=click.Path(path_type=Path, file_okay=False), help="Folder for plots too.")
@click.option("--plot-format", default="svg", show_default=True, type=click.Choice(["svg", "pdf"]))
def report(runs: tuple[Path, ...], out: Path, plots: Path | None, plot_format: str) -> None:
    """Make one HTML page of RUNs: pruned folders, scores files, and folders of comparisons and demos."""
    from secateur.report import write_report
    from secateur.report.runs import read_runs

    found = read_runs(runs)
    drawn: list[Path] = []
    if plots is not None:
        from secateur.report.plots import write_plots

        drawn = write_plots(found, plots, plot_format)
    write_report(found, out)
    click.echo("\n".join([f"report: {out}", *(f"plot: {path}" for path in drawn)]))


@cli.command()
@click.argument("folder")
@click.option(
    "--format", "form", required=True, type=click.Choice(["standalone", "onnx"]),
    help="For transformers alone, or for ONNX Runtime.",
)  # fmt: skip
@_out
@_json
def export(folder: str, form: str, out: Path, as_json: bool) -> None:
    """Write the model in FOLDER for places without secateur, proved equal to it."""
    from secateur.export import export_onnx, export_standalone

    result = export_onnx(folder, out) if form == "onnx" else export_standalone(folder, out)
    if as_json:
        _print_json({**result, "out": str(out)})
    elif form == "onnx":
        click.echo(f"{result['class']}: opset {result['opset']}, {', '.join(result['inputs'])} [batch, sequence]")
        click.echo(f"largest difference to PyTorch in ONNX Runtime {result['max_difference']:.1e}\ngraph: {out}")
    else:
        click.echo(f"{result['class']}, reloaded bit for bit by the code in {out / result['code']} alone")
        click.echo(f"model: {out} (from_pretrained with trust_remote_code=True)")


@cli.command()
@click.argument("source")
@_out
@_json
def convert(source: str, out: Path, as_json: bool) -> None:
    """Bring SOURCE into today's format: a pruned model of transformers 4, or the paper's authors' meta-pruner."""
    from secateur.convert import convert as convert_source

    result = convert_source(source, out)
    if as_json:
        _print_json({**result, "out": str(out)})
    elif result["kind"] == "model":
        click.echo(f"{result['class']} with {result['kept']} of {result['heads']} heads, reloaded bit for bit")
        click.echo(f"model: {out}")
    else:
        click.echo(f"meta-pruner for `--scorer smp --pruner {out}`")


@cli.command()
@_out
@_seed
@_device
@_json
def demo(out: Path, seed: int, device: str | None, as_json: bool) -> None:
    """Run the whole path on a real model and real texts from PyPI, and write DIR/report.html."""
    from secateur.demo import run_demo
    from secateur.model.loading import check_device
    from secateur.tables import demo_table, print_table

    check_new_folder(out)
    with new_folder(out) as folder:
        result = run_demo(folder, seed=seed, device=check_device(device), command=_command_line())
    if as_json:
        _print_json(result)
    else:
        print_table(demo_table(result))
        click.echo(f"report: {out / 'report.html'}\npruned model: {out / 'pruned'}")


def _processes(device: str | None) -> tuple[Accelerator, torch.device]:
    """Return this process's place among those that a launcher started, if one did, and the device it works on."""
    from accelerate import Accelerator

    from secateur.model.loading import check_device

    accelerator = Accelerator()
    alone = accelerator.num_processes == 1 or device is not None
    return accelerator, check_device(device) if alone else accelerator.device


def _calibration(data: str, options: dict[str, Any]) -> tuple[Iterable[Text], Any]:
    """Return calibration texts and labels: a random choice of the data's rows by the seed, or the first of a stream."""
    from secateur.data import load_task
    from secateur.errors import invalid
    from secateur.streams import stream_texts

    need_labels = scorer_class(options["scorer"]).needs_labels
    number = options["num_texts"]
    if number is None and options["stop"] == "all":
        number = _CALIBRATION_TEXTS
    if options["stream"]:
        if need_labels:
            raise invalid("stream", f"not be given with scorer {options['scorer']}, which needs labels", True)
        return itertools.islice(stream_texts(data, options["split"], options["seed"]), number), None
    task = load_task(data, options["split"], need_labels=need_labels)
    task = task.head(number or len(task), seed=options["seed"])
    return task.texts, task.labels


def _scorer(options: dict[str, Any]) -> Scorer:
    """Build the scorer with its options; values are JSON where they can be read as such, else strings."""
    chosen: dict[str, Any] = {}
    for item in options["scorer_options"]:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise click.UsageError(f"`option` must be NAME=VALUE, got {item}")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    if options["pruner"] is not None:
        if not options["scorer"].startswith("smp"):
            raise click.UsageError("`pruner` goes with `--scorer smp` and `--scorer smp-plus` only")
        chosen["pruner"] = options["pruner"]
    return make_scorer(options["scorer"], **chosen)


def _ends_as_main(accelerator: Accelerator) -> bool:
    """End the work that processes share, all at once, and say whether this is the one that goes on to write."""
    accelerator.wait_for_everyone()  # a process that just leaves can make the others abort
    accelerator.end_training()
    return bool(accelerator.is_main_process)


@contextmanager
def _stoppable(hint: str) -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None


def _settled(read: int | None, texts: Iterable[Text], agreement: float) -> str:
    given = f"{read} of {len(texts)}" if isinstance(texts, Sequence) else f"{read}"
    return (
        f"{given} texts scored: at least {agreement:.0%} of the heads, with 95% confidence, are judged as "
        "all texts would judge them"
    )


def _echo_metrics(metrics: dict[str, float], main: str) -> None:
    for name, value in metrics.items():
        click.echo(f"{name} {value:.4f}" + (" (main metric)" if name == main else ""))


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


def _command_line() -> str:
    return " ".join(["secateur", *sys.argv[1:]])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 with one line on stderr for bad input, 130 for Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # PyTorch's profiler tells stderr that it starts and stops
    show, warnings.showwarning = warnings.showwarning, _in_one_line(warnings.showwarning)
    try:
        code, message = _run(arguments)
    finally:
        warnings.showwarning = show
    if message:  # the last line: what the exception held on to, such as a progress bar, has been closed by now
        click.echo(message, err=True)
    return code


def _run(arguments: list[str] | None) -> tuple[int, str]:
    """Return the exit code, and the line that explains it."""
    try:
        result = cli.main(arguments, prog_name="secateur", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code, ""
    except click.exceptions.NoArgsIsHelpError as error:
        return 2, error.format_message()
    except click.ClickException as error:
        return 2, _error(error.format_message())
    except (click.Abort, KeyboardInterrupt) as stop:
        hint = str(stop.__cause__ or stop)  # click raises its Abort from the exception that holds it
        return 130, f"secateur: stopped; {hint or 'nothing half-written is left'}"
    except (SecateurError, OSError) as error:
        return 2, _error(str(error))
    except (RuntimeError, MemoryError) as error:
        from secateur.halving import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return 2, _error(f"out of memory; a smaller `--batch-size` or `--max-length` takes less ({str(error)[:100]})")
    return (result if isinstance(result, int) else 0), ""


def _in_one_line(show: Callable[..., None]) -> Callable[..., None]:
    """Show our own warnings as the errors are shown, and others as before."""

    def shown(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, SecateurWarning):
            click.echo(f"secateur: {' '.join(str(message).split())}", err=True)
        else:
            show(message, category, *place)

    return shown


def _error(message: str) -> str:
    line = " ".join(message.split())
    # What a file or a name holds must not steer the terminal.
    return "secateur: error: " + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


if __name__ == "__main__":
    sys.exit(main())
