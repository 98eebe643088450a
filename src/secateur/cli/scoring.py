"""What `score` and `prune` share: options, the scorer and the texts that these ask for, processes of a launcher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import (
    StopRule,
    batch_option,
    bf16_option,
    columns_of,
    columns_options,
    length_option,
    seed_option,
    together,
)
from secateur.errors import InvalidInputError
from secateur.scorers import DEFAULT_SCORER, LAYER_SCORERS, SCORERS, make_scorer, scorer_class
from secateur.support.defaults import CALIBRATION_TEXTS, TEACHING_TEXTS, UNITS
from secateur.support.parsing import parse_json

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from secateur.scorers.base import Scorer
    from secateur.texts.tokenization import Text


class Names(click.ParamType):
    """Words out of `known`, with commas between them."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name, self.known = name, known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the words, or fail in the one error form."""
        words = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if not words or len(set(words)) < len(words) or not set(words) <= set(self.known):
            self.fail(f"`{self.name}` must be some of {', '.join(self.known)}, with commas, got {value}", param, ctx)
        return words


class ScorerNames(click.ParamType):
    """A criterion, or one for each kind of unit, such as heads=matching,neurons=contribution."""

    name = "name|kind=name,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | dict[str, str]:
        """Return the name, or the names by kind, or fail in the one error form."""
        if isinstance(value, dict) or "=" not in value:
            return value if isinstance(value, dict) else self._known(value, param, ctx)
        found: dict[str, str] = {}
        for part in value.split(","):
            kind, _, name = part.partition("=")
            if kind not in UNITS or kind in found:
                self.fail(f"`scorer` must name each of {', '.join(UNITS)} once at most, got {value}", param, ctx)
            found[kind] = self._known(name, param, ctx)
        return found

    def _known(self, name: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        known = sorted(SCORERS | LAYER_SCORERS)
        if name not in known:
            self.fail(f"`scorer` must be one of {', '.join(known)}, got {name}", param, ctx)
        return name


units_option = click.option(
    "--units", default=None, type=Names("units", UNITS), metavar="KINDS",
    help="Kinds of units, heads,neurons,layers [default: those that the budget is about, else heads].",
)  # fmt: skip

scoring_options = together(
    columns_options,
    click.option(
        "--scorer", default=DEFAULT_SCORER, show_default=True, type=ScorerNames(),
        help="Criterion of the kinds of units that it can score, or one a kind: heads=matching,neurons=contribution. "
        f"One of {', '.join(sorted(SCORERS | LAYER_SCORERS))}.",
    ),
    units_option,
    click.option(
        "--option", "scorer_options", multiple=True, metavar="NAME=VALUE",
        help="An option of the scorer, such as warmup_epochs=1; may be repeated.",
    ),
    click.option("--pruner", default=None, help="Meta-pruner of smp, smp-plus: folder, Hub id, the authors' .bin."),
    click.option("--split", default="train", show_default=True, type=click.Choice(["train", "dev", "test"])),
    click.option(
        "--texts", "num_texts", default=None, type=click.IntRange(1),
        help=f"Calibration texts, drawn from the data with the seed [default: {CALIBRATION_TEXTS}; up to "
        f"{TEACHING_TEXTS:,} where they teach too; all with --stop].",
    ),
    click.option(
        "--stop", default="all", show_default=True, type=StopRule(),
        help="Score all of them, a number, or, in random order, as many as it takes until the heads to keep settle.",
    ),
    click.option(
        "--stream", is_flag=True,
        help="Read the data one batch after the other, shuffled among the next 10,000 texts; shards by a pattern too.",
    ),
    batch_option,
    length_option,
    seed_option,
    click.option(
        "--device", default=None,
        help="cpu, cuda …, or auto: spread over GPUs, memory and disk [default: a GPU where there is one].",
    ),
    bf16_option("Score with matrix products"),
)  # fmt: skip


def scorer_of(options: Mapping[str, Any]) -> str | Scorer | dict[str, Scorer]:
    """Build the scorer with its options, or one for each kind; values are JSON where they can be read, else strings."""
    chosen: dict[str, Any] = {}
    for item in options["scorer_options"]:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise click.UsageError(f"`option` must be NAME=VALUE, got {item}")
        try:
            chosen[name] = parse_json(value, f"`option` {name}")
        except InvalidInputError:
            chosen[name] = value
    if options["pruner"] is not None:
        if not str(options["scorer"]).startswith("smp"):
            raise click.UsageError("`pruner` goes with `--scorer smp` and `--scorer smp-plus` only")
        chosen["pruner"] = options["pruner"]
    if isinstance(options["scorer"], str):
        return make_scorer(options["scorer"], **chosen) if chosen else options["scorer"]
    if chosen:
        raise click.UsageError("`option` goes with one `--scorer` alone, got one for each kind of unit")
    return {kind: make_scorer(name) for kind, name in options["scorer"].items()}


def calibration_of(data: str, options: Mapping[str, Any], teaches: bool = False) -> tuple[Iterable[Text], Any]:
    """Return calibration texts and labels: a random choice of the data's rows by the seed, or the first of a stream.

    There are more where they also teach the smaller model.
    """
    from secateur.errors import invalid
    from secateur.texts.data import load_task
    from secateur.texts.streams import stream_texts

    named, columns = options["scorer"], columns_of(options)
    need_labels = any(
        scorer_class(name).needs_labels for name in ([named] if isinstance(named, str) else named.values())
    )
    number = options["num_texts"]
    if number is None and options["stop"] == "all":
        number = TEACHING_TEXTS if teaches and not options["stream"] else CALIBRATION_TEXTS
    if options["stream"]:
        if need_labels:
            raise invalid("stream", f"not be given with scorer {options['scorer']}, which needs labels", True)
        return itertools.islice(stream_texts(data, options["split"], options["seed"], columns), number), None
    task = load_task(data, options["split"], need_labels=need_labels, columns=columns)
    task = task.head(number or len(task), seed=options["seed"])
    return task.texts, task.labels


def processes(device: str | None) -> tuple[Accelerator, torch.device | str]:
    """Return this process's place among those that a launcher started, if one did, and the device it works on.

    Or "auto", of one process alone.
    """
    from accelerate import Accelerator

    from secateur.errors import invalid
    from secateur.models.loading import SPREAD, check_device

    accelerator = Accelerator()
    if device == SPREAD:
        if accelerator.num_processes > 1:
            raise invalid("device", "be one of its own for each process that a launcher started", device)
        return accelerator, device
    alone = accelerator.num_processes == 1 or device is not None
    return accelerator, check_device(device) if alone else accelerator.device


def ends_as_main(accelerator: Accelerator) -> bool:
    """End the work that processes share, all at once, and say whether this is the one that goes on to write."""
    accelerator.wait_for_everyone()  # a process that just leaves can make the others abort
    accelerator.end_training()
    return bool(accelerator.is_main_process)


def settled(read: int | None, texts: Iterable[Text], agreement: float) -> str:
    """Say how sure it is that the texts left unread would change nothing."""
    scored = f"{read} of {len(texts)}" if isinstance(texts, Sequence) else f"{read}"
    return (
        f"{scored} texts scored: at least {agreement:.0%} of the heads, with 95% confidence, are judged as "
        "all texts would judge them"
    )
