"""Units in a grid for notebooks, a row a site: how they were scored, and which stay."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from torch import Tensor

MOST_CELLS = 64
"""Units of a site that have a cell each; thousands of neurons are counted."""
_TEXT = "text-align:left;padding-right:.5em;white-space:nowrap"
_CELL = "width:1.3em;height:1.3em;padding:0;text-align:center;border:1px solid rgba(128,128,128,.5);"


def grid_html(headline: str, kept: Mapping[str, Tensor] | None, scores: Mapping[str, Tensor] | None) -> str:
    """Return the HTML of a headline and a grid of sites: `kept` bool `[units]`, `scores` float `[units]`, or both.

    A cell is the darker the higher its unit's score is in its site, or dark where there are no scores; a unit that goes
    has a cross, and one that an earlier removal took a dot.
    """
    sites = list(kept if kept is not None else scores or {})
    rows = "".join(
        _row(site, label, None if kept is None else kept[site], None if scores is None else scores.get(site))
        for site, label in zip(sites, short_labels(sites), strict=True)
    )
    return f'<p>{html.escape(headline)}</p><table style="border-collapse:collapse">{rows}</table>'


def _row(site: str, label: str, kept: Tensor | None, scores: Tensor | None) -> str:
    """Return a row of the table: a cell for each unit, or how many there are of many."""
    stays = None if kept is None else kept.tolist()
    values = [None] * len(stays or []) if scores is None else scores.tolist()
    if len(values) > MOST_CELLS:
        count = f"{len(values):,}" if stays is None else f"{sum(stays):,} of {len(stays):,} kept"
        cells = f'<td colspan="{MOST_CELLS}" style="{_TEXT}">{count}</td>'
    else:
        known = [value for value in values if value is not None and value > -math.inf]
        low, high = min(known, default=0.0), max(known, default=0.0)
        cells = "".join(
            _cell(unit, None if stays is None else stays[unit], value, (low, high)) for unit, value in enumerate(values)
        )
    return f'<tr><th style="{_TEXT}" title="{html.escape(site)}">{html.escape(label)}</th>{cells}</tr>'


def _cell(unit: int, stays: bool | None, score: float | None, bounds: tuple[float, float]) -> str:
    """Return one cell, with the facts in words as its title."""
    low, high = bounds
    is_gone = score == -math.inf
    shade, facts = (0.0 if stays is False else 0.8), f"{unit}"
    if score is not None and not is_gone:
        shade = 0.1 + 0.7 * ((score - low) / (high - low) if high > low else 1.0)
        facts += f": score {score:.4g}"
    if is_gone:
        shade, facts = 0.0, f"{facts}: removed before"
    elif stays is not None:
        facts += ", kept" if stays else ", removed"
    mark = "&middot;" if is_gone else "&times;" if stays is False else ""
    return f'<td style="{_CELL}background:rgba(42,120,214,{shade:.2f})" title="{facts}">{mark}</td>'


def short_labels(names: list[str]) -> list[str]:
    """Return labels such as `layer 0`, or longer ones where those would not tell the sites apart."""
    parts = [name.split(".") for name in names]
    numbers = [[part for part in split if part.isdecimal()] for split in parts]
    if not all(numbers):
        return names
    if len({len(row) for row in numbers}) == 1 and len(names) > 1:
        # A number that is the same in every name says nothing, such as the second one of `block.3.layer.0`.
        varying = [len(set(column)) > 1 for column in zip(*numbers, strict=True)]
        numbers = [[n for n, varies in zip(row, varying, strict=True) if varies] or row for row in numbers]
    labels = [f"layer {'.'.join(row)}" for row in numbers]
    if len(set(labels)) == len(names):
        return labels
    shared = 0
    while len({split[shared] for split in parts if len(split) > shared}) == 1:
        shared += 1
    stacks = [split[min(shared, len(split) - 1)] for split in parts]
    labels = [f"{stack} {'.'.join(row)} {split[-1]}" for stack, row, split in zip(stacks, numbers, parts, strict=True)]
    return labels if len(set(labels)) == len(names) else names
