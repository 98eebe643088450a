"""What `score` and `prune` share: options, the scorer and the texts that these ask for, processes of a launcher."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import (
    StopRule,
    batch_option,
    bf16_option,
    device_option,
    length_option,
    seed_option,
    together,
)
from secateur.scorers import DEFAULT_SCORER, SCORERS, make_scorer, scorer_class
from secateur.support.defaults import CALIBRATION_TEXTS

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from secateur.scorers.base import Scorer
    from secateur.texts.tokenization import Text

scoring_options = together(
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
        help=f"Calibration texts, drawn from the data with the seed [default: {CALIBRATION_TEXTS}; all with --stop].",
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
    device_option,
    bf16_option("Score with matrix products"),
)  # fmt: skip


def scorer_of(options: Mapping[str, Any]) -> Scorer:
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


def calibration_of(data: str, options: Mapping[str, Any]) -> tuple[Iterable[Text], Any]:
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


def processes(device: str | None) -> tuple[Accelerator, torch.device]:
    """Return this process's place among those that a launcher started, if one did, and the device it works on."""
    from accelerate import Accelerator

    from secateur.models.loading import check_device

    accelerator = Accelerator()
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
