"""One HTML page for prunings, scores and comparisons: what was kept, what it saved, and how scorers fare.

The page is a single file that loads nothing: it can be mailed, archived or printed, and it opens without a network.
Python prepares every number here and the templates only place them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from secateur.errors import invalid
from secateur.report.comparison import comparison_view
from secateur.report.pruned import pruning_view
from secateur.support.files import write_text
from secateur.support.versions import __version__

_CONTROLS = dict.fromkeys(
    [
        *(c for c in range(0xA0) if c not in b"\t\n" and not chr(c).isprintable()),
        *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF),
        *range(0xD800, 0xE000),
    ],
    "\N{REPLACEMENT CHARACTER}",
)

MAX_MAP_CHARACTERS = 1_600_000
"""Attention maps on one page, all runs together; later runs go without, and say so."""


def write_report(runs: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write `render_report(runs)` to `path`, whole or not at all."""
    write_text(path, render_report(runs))


def _printable(value: Any) -> Any:
    """Return a text without characters that control a display or turn the direction of what follows."""
    return value.translate(_CONTROLS) if isinstance(value, str) else value


def render_report(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page for `runs`, which is plain data as `read_runs` returns it, in its order.

    A run's `kind` is "pruning" (where it is absent), "scores" or "comparison": see `pruning_view`, `comparison_view`.
    Raises `InvalidInputError` where a part has another form.
    """
    if not isinstance(runs, list | tuple) or not runs or not all(isinstance(run, dict) for run in runs):
        raise invalid("runs", "be a list of mappings, one for each run", runs)
    views, room = [], MAX_MAP_CHARACTERS
    for number, run in enumerate(runs, 1):
        view = comparison_view(run) if run.get("kind") == "comparison" else pruning_view(run)
        if view.get("maps") is not None:
            size = sum(len(site["levels"]) for site in view["maps"]["sites"].values())
            if size > room:
                view["maps"], view["maps_note"] = None, "Attention maps are left out to keep the page small."
            else:
                room -= size
        views.append({**view, "id": f"run{number}"})
    return _page().render(runs=views, version=__version__)


@cache
def _page() -> Template:
    """Return the template, which takes longer to read than to fill in."""
    # The names of models and sites come from outside: everything is escaped, whatever the template's suffix.
    environment = Environment(
        loader=PackageLoader("secateur.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    return environment.get_template("page.html.j2")
