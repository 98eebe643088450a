"""What stderr has while a command runs: its own lines, and those of other packages only with `--verbose`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import click

from secateur.errors import SecateurWarning
from secateur.support.interrupts import undoing

_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "KINETO_LOG_LEVEL": "5",  # PyTorch's profiler tells stderr that it starts and stops
}
_verbose: ContextVar[bool] = ContextVar("secateur_verbose", default=False)


@undoing
def quiet() -> Iterator[None]:
    """Keep what other packages log and warn of off stderr, errors aside, and show our own warnings as errors are."""
    show, level = warnings.showwarning, logging.root.manager.disable
    before = {name: os.environ.get(name) for name in _SILENT}
    token = _verbose.set(False)
    warnings.showwarning = _ours_alone(show)
    logging.disable(logging.WARNING)
    os.environ.update({name: value for name, value in _SILENT.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        logging.disable(level)
        warnings.showwarning = show
        _verbose.reset(token)


def _ours_alone(show: Callable[..., None]) -> Callable[..., None]:
    def shown(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, SecateurWarning):
            click.echo(f"secateur: {' '.join(str(message).split())}", err=True)
        elif _verbose.get():
            show(message, category, *place)

    return shown


def _show_all(context: click.Context, parameter: click.Parameter, is_wanted: bool) -> None:
    if is_wanted:
        _verbose.set(True)
        logging.disable(logging.NOTSET)
        for name in _SILENT:
            os.environ.pop(name, None)


verbose_option = click.option(
    "--verbose", is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
    help="Show also what other packages log and warn of.",
)  # fmt: skip
