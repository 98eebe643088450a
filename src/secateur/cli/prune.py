"""`secateur prune`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import (
    Place,
    Ratio,
    command_line,
    data_option,
    json_option,
    print_json,
    reading_of,
    together,
)
from secateur.cli.scoring import calibration_of, ends_as_main, processes, scorer_of, scoring_options, settled
from secateur.support.defaults import DISTILLATION_STEPS, FLOOR, PREVIEW_SHARES, PRUNING_RATIO
from secateur.support.files import check_new_folder, new_folder
from secateur.support.run_files import PAGE

if TYPE_CHECKING:
    from secateur.pruning_steps import Steps
    from secateur.report.pruning_report import PruningReport
    from secateur.settings import Cut, Reading
    from secateur.texts.tokenization import Text

cutting_options = together(
    click.option(
        "--ratio", default=PRUNING_RATIO, show_default=True, type=Ratio(),
        help="Fraction of units to remove, in [0, 1).",
    ),
    click.option(
        "--budget", default=None, metavar="QUANTITY=SHARE",
        help="Instead of a ratio, what may remain: macs=0.5, params=0.8, latency=0.8x@8x128, heads=0.75,neurons=0.5, "
        "or how near it stays to the dense model: similarity=0.98.",
    ),
    click.option(
        "--latency-table", default=None, type=Place(exists=True, dir_okay=False), metavar="FILE",
        help="For a budget of latency, what units cost where the model is to run, as `secateur bench --table FILE` "
        "measured it there [default: measured here].",
    ),
    click.option(
        "--allocation", default=None, type=click.Choice(["uniform", "ranking", "sensitivity"]),
        help="The same ratio at every site, one ranking over the model, or by what each site alone changes at the end "
        "[default: sensitivity where neurons or layers go within a budget, else uniform].",
    ),
    click.option(
        "--floor", default=FLOOR, show_default=True, type=click.IntRange(0), help="Units a site keeps at least."
    ),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN",
        help="Sites to keep whole, such as 'encoder.layer.0.*'; may be repeated.",
    ),
    click.option(
        "--plain", is_flag=True,
        help="A folder that loads where secateur is not installed: all layers of a stack keep as many units.",
    ),
    click.option(
        "--refine", default=0, show_default=True, type=click.IntRange(0),
        help="Exchanges of heads to try on the texts after scoring, no labels; each takes a pass.",
    ),
    click.option(
        "--restore", default=None, type=click.Choice(["none", "reconstruct", "distill"]),
        help="How far quality is restored, without labels: refit what the kept units write, and teach the smaller "
        "model what the dense one computes [default: distill where neurons or layers go within a budget, else "
        "reconstruct]. What there are too few texts for is left out.",
    ),
    click.option(
        "--steps", default=DISTILLATION_STEPS, show_default=True, type=click.IntRange(1), help="Updates of distill."
    ),
)  # fmt: skip


@click.command()
@click.argument("model")
@data_option
@cutting_options
@click.option("--maps/--no-maps", default=True, show_default=True, help="Keep mean attention maps for the report page.")
@scoring_options
@click.option(
    "--scores",
    default=None,
    type=Place(exists=True, dir_okay=False),
    metavar="FILE",
    help="Instead of scoring: what `secateur score --out FILE` saved for this model.",
)
@click.option(
    "--dry-run", is_flag=True, help="Remove and write nothing: print what budgets would leave, and what that changes."
)
@click.option("--out", type=Place(), help="New or empty folder for the result.")
@json_option
@click.pass_context
def prune(context: click.Context, model: str, data: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Score MODEL's units, remove the lowest, prove the result, and save it as an ordinary model folder.

    Under `accelerate launch` or torchrun each process scores a share of the texts, and the first one saves.
    """
    if options["dry_run"]:
        _dry_run(context, model, data, as_json, options)
        return
    if out is None:
        raise click.MissingParameter(ctx=context, param=next(one for one in prune.params if one.name == "out"))
    _prune(context, model, data, out, as_json, options)


def _dry_run(context: click.Context, model: str, data: str, as_json: bool, options: Mapping[str, Any]) -> None:
    """Print what budgets would leave: shares of the quantity that a budget names, or else of the work."""
    from secateur.cli.tables import preview_table, print_table
    from secateur.models.loading import load_tokenizer
    from secateur.previewing import COUNT_ALL, preview
    from secateur.settings import Budget, budgets_of

    if options["allocation"] not in (None, "sensitivity"):
        raise click.UsageError("`allocation` must be left out or sensitivity with `--dry-run`")
    asked = list(budgets_of(options["budget"])) if options["budget"] else []
    if any(budget.quantity not in COUNT_ALL for budget in asked):
        raise click.UsageError(
            f"`budget` must be of {', '.join(COUNT_ALL)} with `--dry-run`, got {options['budget']!r}"
        )
    like = asked[0] if asked else Budget("macs", 1.0)
    scorer = _scorer(context, options)
    accelerator, device = processes(options["device"])
    texts, labels = calibration_of(data, options, teaches=_teaches(options))
    is_main = accelerator.is_main_process
    found = preview(
        model, texts, [*asked, *(replace(like, limit=share) for share in PREVIEW_SHARES)], labels=labels,
        scorer=scorer, tokenizer=load_tokenizer(model), cut=_cut(options),
        reading=reading_of(options, device=str(device), accelerator=accelerator, progress=is_main),
    )  # fmt: skip
    if not ends_as_main(accelerator):
        return
    if as_json:
        print_json(found.to_json())
    else:
        print_table(preview_table(found))
        click.echo("change: at the end of the model before teaching, as a share of its variance; 0 = nothing")


def _prune(context: click.Context, model: str, data: str, out: Path, as_json: bool, options: Mapping[str, Any]) -> None:
    """Prune, save, and say what was done."""
    from secateur.models.loading import load_tokenizer
    from secateur.pruning import prune_in_steps
    from secateur.report.pruning_files import save_all
    from secateur.sites.recipe import KEY

    accelerator, device = processes(options["device"])
    is_main = accelerator.is_main_process
    if is_main:
        check_new_folder(out)
    has_ratio = context.get_parameter_source("ratio") is not click.core.ParameterSource.DEFAULT
    if options["budget"] is not None and has_ratio:
        raise click.UsageError("`ratio` must be left out where there is a `--budget`")
    cut = _cut(options)
    scorer = _scorer(context, options)
    texts, labels = calibration_of(data, options, teaches=_teaches(options))
    tokenizer = load_tokenizer(model)
    reading = reading_of(options, device=str(device), accelerator=accelerator, maps=options["maps"], progress=is_main)
    # Of the processes that a launcher started, the first one holds the folder and saves.
    with (
        new_folder(out) if is_main else nullcontext(out) as folder,
        _steps(model, texts, labels, reading, out, options) as kept,
    ):
        pruned, report = prune_in_steps(
            kept, model, texts, cut, scorer=scorer, restore=options["restore"], steps=options["steps"], labels=labels,
            tokenizer=tokenizer, reading=reading,
        )  # fmt: skip
        if not ends_as_main(accelerator):
            return
        report = replace(report, command=command_line())
        save_all(pruned, tokenizer, model, report, folder)
    if as_json:
        print_json({**report.to_json(), "out": str(out)})
    else:
        _echo(report, texts, out)
        if getattr(pruned.config, KEY, None) is None:
            click.echo("it loads where secateur is not installed: its config says all by its own numbers")


@contextmanager
def _steps(
    model: str, texts: Iterable[Text], labels: Any, reading: Reading, out: Path, options: Mapping[str, Any]
) -> Iterator[Steps]:
    """Yield the steps that a run of the same model, texts and options had finished, and keep those of this one.

    Of one process alone, and not of a stream, which is read once.
    """
    from secateur.models.model_content import fingerprint_of_files
    from secateur.pruning_steps import Steps, kept_steps
    from secateur.support.fingerprints import bytes_of, fingerprint
    from secateur.support.processes import is_shared
    from secateur.support.versions import environment

    if is_shared(reading.accelerator) or not isinstance(texts, Sequence):
        yield Steps()
        return
    about = {
        "model": fingerprint_of_files(model),
        "pruner": options.get("pruner") and fingerprint_of_files(options["pruner"]),
        "scores": options["scores"] and fingerprint(bytes_of(options["scores"])),
        "latency_table": options["latency_table"] and fingerprint(bytes_of(options["latency_table"])),
        "texts": fingerprint(repr(row).encode() for row in (*texts, *(labels or ()))),
        "options": {**options, "device": reading.device},
        "versions": environment(),
    }
    place = Path(os.path.realpath(out))
    with kept_steps(place.with_name(f".{place.name}.steps"), about) as kept:
        if names := kept.names():
            click.echo(f"secateur: going on with the {', '.join(names)} of a run that was stopped", err=True)
        yield kept


def _scorer(context: click.Context, options: Mapping[str, Any]) -> Any:
    """Return the scorer, or one for each kind of unit, or the scores of a file, which leave nothing to be said."""
    if options["scores"] is None:
        return scorer_of(options)
    from secateur.units.scores import Scores

    for name in ("scorer", "scorer_options", "pruner", "stop"):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            said = name.removeprefix("scorer_").removesuffix("s")
            raise click.UsageError(f"`{said}` must be left out where there are `--scores`")
    return Scores.load(options["scores"])


def _teaches(options: Mapping[str, Any]) -> bool:
    """Will the smaller model be taught, by what was asked for or unasked?"""
    from secateur.pruning_plan import recommended
    from secateur.restoring.distillation import FEWEST

    return recommended(_cut(options), options["restore"], range(FEWEST))[1] == "distill"


def _cut(options: Mapping[str, Any]) -> Cut:
    """Return what may go."""
    from secateur.settings import Cut

    names = ("allocation", "floor", "budget", "units", "exclude", "plain", "refine", "latency_table")
    return Cut(options["ratio"], **{name: options[name] for name in names})


def _echo(report: PruningReport, texts: Iterable[Text], out: Path) -> None:
    """Say what was removed, what that saves, and what each step gave."""
    from secateur.cli.tables import print_table, pruning_table
    from secateur.report.relational_kl import distillation_line, reconstruction_line, refinement_line

    print_table(pruning_table(report))
    click.echo(f"{report}\nproof: largest difference to the gated model {report.max_difference:.1e}")
    if report.agreement is not None:
        click.echo(settled(report.num_texts, texts, report.agreement))
    if report.refinement:
        click.echo(refinement_line(report.refinement))
    if report.reconstruction:
        before, after = report.reconstruction
        click.echo(reconstruction_line(before, after))
    if report.distillation:
        before, after = report.distillation
        click.echo(distillation_line(before, after, report.steps))
    if report.quality is not None:
        click.echo(f"quality: {report.quality}")
    for line in report.left_out:
        click.echo(line)
    click.echo(f"model: {out}\nreport: {out / PAGE}")
