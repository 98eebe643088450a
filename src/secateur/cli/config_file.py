"""A YAML file in the place of flags."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import Place
from secateur.errors import shown
from secateur.support.parsing import read_yaml


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Take the values of a YAML file for the flags that are left out; click checks them as it checks flags."""
    if path is None:
        return None
    values = read_yaml(path)
    flags = {
        o.opts[0].lstrip("-"): o for o in context.command.params if isinstance(o, click.Option) and o is not parameter
    }
    _check(path, values, flags)
    named = {}
    for name, value in values.items():
        many = isinstance(value, list)
        texts = [_as_typed(path, part, flags[name]) for part in (value if many else [value])]
        named[flags[name].name] = texts if many or flags[name].multiple else texts[0]
    context.default_map = named
    return path


def _check(path: Path, values: Any, flags: Mapping[str, click.Option]) -> None:
    """Refuse what is no mapping from the command's flags to values."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise click.BadParameter(f"{path} must hold `flag: value` lines")
    if unknown := sorted(set(values) - set(flags)):
        raise click.BadParameter(f"{path} has {', '.join(unknown)}, which is none of {', '.join(sorted(flags))}")
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if not parts or any(part is None or isinstance(part, list | dict) for part in parts):
            raise click.BadParameter(f"{path}: `{name}` must have a value, or a list of values, got {shown(value)}")
        if isinstance(value, list) and not flags[name].multiple:
            raise click.BadParameter(f"{path}: `{name}` must have one value, got {shown(value)}")


def _as_typed(path: Path, value: Any, flag: click.Option) -> Any:
    """Return a value as it would have been typed on the command line, where all are texts; of switches as it is."""
    if isinstance(value, bool):
        if not flag.is_flag:
            raise click.BadParameter(f"{path}: `{flag.opts[0].lstrip('-')}` must be no {value}; put it in quotes")
        return value
    if not isinstance(value, str | int | float | date):
        raise click.BadParameter(f"{path}: `{flag.opts[0].lstrip('-')}` must be a text or a number, got {shown(value)}")
    return str(value)


config_option = click.option(
    "--config",
    default=None,
    is_eager=True,
    callback=_read_config,
    expose_value=False,
    type=Place(exists=True, dir_okay=False),
    help="YAML file with the flags below, less the dashes.",
)
