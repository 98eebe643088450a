"""`info`, `score`, `prune` and `verify`: from a model to a smaller one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import (
    Place,
    Ratio,
    bf16_scoring_option,
    command_line,
    data_option,
    device_option,
    json_option,
    out_option,
    print_json,
    scoring_options,
)
from secateur.scorers import make_scorer, scorer_class
from secateur.support.defaults import CALIBRATION_TEXTS, FLOOR, PRUNING_RATIO
from secateur.support.files import check_can_write, check_new_folder, new_folder

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from secateur.scorers.base import Scorer
    from secateur.settings import Reading
    from secateur.texts.tokenization import Text


@click.command()
@click.argument("model")
@device_option
@json_option
def info(model: str, device: str | None, as_json: bool) -> None:
    """Show MODEL's attention sites, heads, parameters, multiply-accumulates, and whether heads can be removed."""
    from secateur.cli.tables import info_table, print_table
    from secateur.errors import UnsupportedModelError
    from secateur.measuring.cost import count_parameters, measure_cost
    from secateur.models.loading import check_device, load_model
    from secateur.sites.attention import find_sites

    loaded = load_model(model, check_device(device))
    facts: dict[str, Any] = {"model": model, "class": type(loaded).__name__, "parameters": count_parameters(loaded)}
    try:
        sites = find_sites(loaded)
        facts |= {"prunable": True, "cost": measure_cost(loaded).to_json()}
        facts["sites"] = [
            {
                "name": site.name,
                "heads": site.num_units,
                "key_value_heads": site.num_groups,
                "original_heads": site.original_num_units,
            }
            for site in sites.values()
        ]
    except UnsupportedModelError as error:
        facts |= {"prunable": False, "reason": str(error)}
    if as_json:
        print_json(facts)
    else:
        print_table(info_table(facts))


@click.command()
@click.argument("model")
@data_option
@scoring_options
@bf16_scoring_option
@click.option("--out", type=Place(dir_okay=False), help="Write the scores to this JSON file.")
@json_option
def score(model: str, data: str, bf16: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score every attention head of MODEL on a task's texts; some scorers need their labels too.

    Under `accelerate launch` or torchrun each process scores a share of the texts. `--device auto` is for a model that
    is larger than a GPU: it is spread over GPUs, memory and disk (`device_map="auto"`).
    """
    from secateur.cli.tables import print_table, scores_table
    from secateur.errors import invalid
    from secateur.models.loading import load_model, load_tokenizer
    from secateur.scorers.score import score as score_model

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
    placed: dict[str, Any] = {"device_map": "auto"} if spread else {}
    scores = score_model(
        load_model(model, device, **placed), texts, scorer, load_tokenizer(model), labels=labels,
        reading=_reading(options, bf16, accelerator),
    )  # fmt: skip
    if not _ends_as_main(accelerator):
        return
    if scores.agreement is not None:
        click.echo(_settled(scores.num_texts, texts, scores.agreement), err=True)
    if out is not None:
        scores.save(out)
        click.echo(f"scores of {len(scores)} sites: {out}", err=True)
    if as_json:
        print_json(scores.to_json())
    elif out is None:
        print_table(scores_table(scores))


@click.command()
@click.argument("model")
@data_option
@click.option(
    "--ratio", default=PRUNING_RATIO, show_default=True, type=Ratio(), help="Fraction of heads to remove, in [0, 1)."
)
@click.option(
    "--budget",
    default=None,
    metavar="QUANTITY=SHARE",
    help="Instead of a ratio, what may remain: heads=0.5, params=0.95, macs=0.85, latency=0.8x@8x128.",
)
@click.option(
    "--allocation", default="uniform", show_default=True, type=click.Choice(["uniform", "ranking"]),
    help="The same ratio at every site, or one ranking over the model.",
)  # fmt: skip
@click.option("--floor", default=FLOOR, show_default=True, type=click.IntRange(0), help="Heads a site keeps at least.")
@click.option(
    "--refine",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Exchanges of heads to try on the texts after scoring, no labels; each takes a pass.",
)
@click.option(
    "--restore",
    default="none",
    show_default=True,
    type=click.Choice(["none", "reconstruct"]),
    help="reconstruct: refit what the kept heads write on the texts, no labels, so that it makes up for the others.",
)
@click.option("--maps/--no-maps", default=True, show_default=True, help="Keep mean attention maps for the report page.")
@scoring_options
@bf16_scoring_option
@out_option
@json_option
@click.pass_context
def prune(
    context: click.Context, model: str, data: str, ratio: float, budget: str | None, allocation: Any, floor: int,
    refine: int, restore: Any, maps: bool, bf16: bool, out: Path, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Score MODEL's heads, remove the lowest, prove the result, and save it as an ordinary model folder.

    Under `accelerate launch` or torchrun each process scores a share of the texts, and the first one saves.
    """
    from dataclasses import replace

    from secateur.cli.tables import print_table, pruning_table
    from secateur.models.loading import load_tokenizer
    from secateur.models.sentence_transformers import copy_modules
    from secateur.pruning import prune as prune_model
    from secateur.report import write_report
    from secateur.report.reading import ATTENTION_MAPS, PRUNING, read_runs
    from secateur.settings import Budget

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
            allocation=allocation,
            floor=floor,
            refine=refine,
            restore=restore,
            labels=labels,
            tokenizer=tokenizer,
            reading=replace(_reading(options, bf16, accelerator), device=str(device), maps=maps),
        )
        if not _ends_as_main(accelerator):
            return
        report = replace(report, command=command_line())
        place = copy_modules(model, folder)
        pruned.save_pretrained(place)
        tokenizer.save_pretrained(place)
        report.save(folder / PRUNING)
        if report.attention_maps is not None:
            report.attention_maps.save(folder / ATTENTION_MAPS)
        write_report(read_runs([folder]), folder / "report.html")
    if as_json:
        print_json({**report.to_json(), "out": str(out)})
    else:
        print_table(pruning_table(report))
        click.echo(f"{report}\nproof: largest difference to the gated model {report.max_difference:.1e}")
        if report.agreement is not None:
            click.echo(_settled(report.num_texts, texts, report.agreement))
        if report.refinement:
            first, best = report.refinement[0], min(report.refinement)
            tried = len(report.refinement) - 1
            click.echo(f"relational KL on these texts {first:.4f}, after {tried} exchanges {best:.4f}")
        if report.reconstruction:
            without, after = report.reconstruction
            what = f"with reconstruction {after:.4f}" if after < without else "no lower with reconstruction, so without"
            click.echo(f"relational KL on these texts {without:.4f}, {what}")
        click.echo(f"model: {out}\nreport: {out / 'report.html'}")


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
        click.echo(f"{folder} {verdict} {result['against']} with {result['dropped']} heads gated{refitted}{since}")
        click.echo(f"largest difference {result['max_difference']:.1e} (at most {result['tolerance']:g} is accepted)")
    if not result["equal"]:
        raise click.exceptions.Exit(1)


def _reading(options: dict[str, Any], bf16: bool, accelerator: Accelerator) -> Reading:
    """Return how the texts are read, as the options that commands share say it."""
    from secateur.settings import Reading

    names = ("batch_size", "max_length", "seed", "stop")
    named = {name: options[name] for name in names}
    return Reading(**named, bf16=bf16, accelerator=accelerator, progress=accelerator.is_main_process)


def _processes(device: str | None) -> tuple[Accelerator, torch.device]:
    """Return this process's place among those that a launcher started, if one did, and the device it works on."""
    from accelerate import Accelerator

    from secateur.models.loading import check_device

    accelerator = Accelerator()
    alone = accelerator.num_processes == 1 or device is not None
    return accelerator, check_device(device) if alone else accelerator.device


def _calibration(data: str, options: dict[str, Any]) -> tuple[Iterable[Text], Any]:
    """Return calibration texts and labels: a random choice of the data's rows by the seed, or the first of a stream."""
    from secateur.errors import invalid
    from secateur.texts.data import load_task
    from secateur.texts.streams import stream_texts

    need_labels = scorer_class(options["scorer"]).needs_labels
    number = options["num_texts"]
    if number is None and options["stop"] == "all":
        number = CALIBRATION_TEXTS
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


def _settled(read: int | None, texts: Iterable[Text], agreement: float) -> str:
    given = f"{read} of {len(texts)}" if isinstance(texts, Sequence) else f"{read}"
    return (
        f"{given} texts scored: at least {agreement:.0%} of the heads, with 95% confidence, are judged as "
        "all texts would judge them"
    )
