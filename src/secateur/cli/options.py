"""Options that commands share, and their values; what is printed in the same way everywhere."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.errors import shown
from secateur.support.checks import LARGEST_SEED
from secateur.support.defaults import BATCH_SIZE, MAX_LENGTH

if TYPE_CHECKING:
    from secateur.settings import Reading
    from secateur.texts.data import Columns


class Ratio(click.ParamType):
    """A fraction in [0, 1)."""

    name = "ratio"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail in the one error form."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number < 1:
            guess = f"; did you mean {number / 100:g}?" if 1 < number < 100 else ""
            self.fail(f"`{param.name if param else 'ratio'}` must be in [0, 1), got {value}{guess}", param, ctx)
        return number


class StopRule(click.ParamType):
    """`all`, `auto`, or how many texts."""

    name = "all|auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word or the number, or fail in the one error form."""
        if value in ("all", "auto"):
            return value
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"`stop` must be all, auto or a whole number from 1, got {value}", param, ctx)
        return int(value)


class Place(click.Path):
    """A path, of which `~` is the home folder also where the shell has left it, as in `--out=~/small`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or fail in the one error form."""
        if "\0" in value:  # a shell cannot say that, a file can
            self.fail(f"`{param.name if param else 'path'}` must be a path, got {shown(value)}", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Positive(click.ParamType):
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


def together(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Join several click options into one decorator."""
    return lambda function: functools.reduce(lambda f, decorate: decorate(f), reversed(decorators), function)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

device_option = click.option("--device", default=None, help="cpu, cuda … [default: a GPU where there is one]")

seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, LARGEST_SEED), help="Seed of everything random."
)

out_option = click.option("--out", required=True, type=Place(), help="New or empty folder for the result.")

length_option = click.option(
    "--max-length", default=MAX_LENGTH, show_default=True, type=click.IntRange(4), help="Tokens a text."
)

batch_option = click.option(
    "--batch-size", default=BATCH_SIZE, show_default=True, type=click.IntRange(1), help="Texts a batch."
)

data_option = click.option(
    "--data", required=True, help="Texts: a file (csv, tsv, jsonl, parquet), a folder with train and dev, or a Hub id."
)

models_option = click.option(
    "--model", "models", multiple=True, required=True, help="Frozen model to learn on; may be repeated."
)
tasks_option = click.option("--data", multiple=True, required=True, help="A task, as for prune; may be repeated.")


def bf16_option(what: str) -> Callable[..., Any]:
    """Return the option `--bf16` of a command that does `what` in it."""
    return click.option(
        "--bf16", is_flag=True,
        help=f"{what} in bfloat16: faster where the device has it, far slower on a CPU that has not.",
    )  # fmt: skip


columns_options = together(
    click.option(
        "--text-column", default=None, metavar="NAME[,NAME]",
        help="Column of the data with the texts, or two for pairs [default: sentence, text, or sentence1,sentence2].",
    ),
    click.option("--label-column", default=None, metavar="NAME", help="Column with the labels [default: label]."),
)  # fmt: skip

training_options = together(
    data_option,
    columns_options,
    batch_option,
    length_option,
    device_option,
    json_option,
)


def reading_of(options: Mapping[str, Any], **others: Any) -> Reading:
    """Return how texts are read, as the options say it that a command has of these."""
    from secateur.settings import Reading

    named = ("batch_size", "max_length", "seed", "stop", "bf16")
    return Reading(**{name: options[name] for name in named if name in options}, **others)


def columns_of(options: Mapping[str, Any]) -> Columns:
    """Return which columns of the data are read."""
    from secateur.texts.data import Columns

    texts = options["text_column"]
    return Columns(None if texts is None else tuple(texts.split(",")), options["label_column"])


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """Say after Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None


def print_json(data: Any) -> None:
    """Print the one JSON object of `--json`."""
    click.echo(json.dumps(data, indent=1))


def command_line() -> str:
    """Return what was typed, for a report."""
    return " ".join(["secateur", *sys.argv[1:]])


def echo_metrics(metrics: Mapping[str, float], main: str) -> None:
    """Print a line for each metric of a task."""
    for name, value in metrics.items():
        click.echo(f"{name} {value:.4f}" + (" (main metric)" if name == main else ""))
