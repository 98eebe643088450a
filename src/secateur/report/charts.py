"""Charts as plain data, and their geometry for inline SVG.

A chart is data first (`Chart`), so that the page and the plots for papers draw the same numbers. No charting library
writes SVG that takes its colours from the page's style sheet, dark mode and print included, without a script or a
megabyte of code, and the page needs two simple kinds of chart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.report.numbers import log_ticks, place, ticks

COLOURS = 8
DENSE_LOOK, RANDOM_LOOK = -2, -1
MARKERS = ("square", "triangle", "diamond", "cross", "down", "circle", "bar")
"""A series is told apart by its marker as well as by its colour."""

WIDTH, HEIGHT = 360.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 40.0


@dataclass(frozen=True)
class Point:
    """One measurement: `spread` is its standard deviation, `note` says it in words, `marked` gives it a marker."""

    x: float
    y: float
    spread: float | None = None
    note: str = ""
    marked: bool = True


@dataclass(frozen=True)
class Series:
    """Points of one kind, in the order of x where they are joined by a line, with a look of their own.

    `look` counts from 0; `DENSE_LOOK` and `RANDOM_LOOK` are the two that comparisons are measured against.
    """

    name: str
    look: int
    points: Sequence[Point]
    line: bool = True
    small: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn in one pair of axes. `slug` names its file, `title` and `summary` stand for it in words."""

    slug: str
    title: str
    summary: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    x_at: Sequence[float] = ()
    """Where ticks stand, as percentages; round numbers where it is empty."""


def look_name(look: int) -> str:
    """Return the class that gives a series its colour."""
    return {DENSE_LOOK: "dense", RANDOM_LOOK: "floor"}.get(look, f"c{look % COLOURS}")


def marker_name(look: int) -> str:
    """Return the marker of a series."""
    return {DENSE_LOOK: "circle", RANDOM_LOOK: "bar"}.get(look, MARKERS[look % len(MARKERS)])


def drawn(chart: Chart) -> dict[str, Any]:
    """Return what the template places: ticks, paths and markers in the units of the drawing."""
    points = [point for series in chart.series for point in series.points]
    x_low, x_high = _range([p.x for p in points], chart.log_x)
    y_low, y_high = _range([p.y + sign * (p.spread or 0.0) for p in points for sign in (-1, 1)])

    def x(value: float) -> float:
        part = (
            place(math.log10(value), math.log10(x_low), math.log10(x_high))
            if chart.log_x
            else place(value, x_low, x_high)
        )
        return round(LEFT + part * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - place(value, y_low, y_high) * (HEIGHT - TOP - BOTTOM), 1)

    series = []
    for one in chart.series:
        corners = [(x(p.x), y(p.y)) for p in one.points]
        band = [(x(p.x), y(p.y + (p.spread or 0.0))) for p in one.points]
        band += [(x(p.x), y(p.y - (p.spread or 0.0))) for p in reversed(one.points)]
        spreads = [p.spread for p in one.points]
        joined = one.line and len(corners) > 1
        # Steps stay level from one point to the next.
        if one.steps:
            turns = [(after[0], before[1]) for before, after in pairwise(corners)]
            corners_of_line = [c for pair in zip(corners, turns, strict=False) for c in pair] + corners[-1:]
        else:
            corners_of_line = corners
        series.append(
            {
                "name": one.name,
                "look": look_name(one.look),
                "marker": marker_name(one.look),
                "line": _path(corners_of_line) if joined else None,
                "band": _path(band) + "Z" if joined and any(spreads) else None,
                "bars": [(x(p.x), y(p.y - p.spread), y(p.y + p.spread)) for p in one.points if p.spread and not joined],
                "small": one.small,
                "points": [(*corner, p.note) for corner, p in zip(corners, one.points, strict=True) if p.marked],
            }
        )
    if chart.x_at:
        found = [(place(value, x_low, x_high), f"{value:.0%}") for value in chart.x_at]
    else:
        found = log_ticks(x_low, x_high) if chart.log_x else ticks(x_low, x_high)
    return {
        "slug": chart.slug,
        "title": chart.title,
        "summary": chart.summary,
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "x_ticks": [(round(LEFT + part * (WIDTH - LEFT - RIGHT), 1), label) for part, label in found],
        "y_ticks": [
            (round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1), label) for part, label in ticks(y_low, y_high)
        ],
        "series": series,
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
        "width": WIDTH,
        "height": HEIGHT,
    }


def _range(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return the ends of an axis, a little beyond the values."""
    low, high = min(values), max(values)
    if log:
        room = max((math.log10(high) - math.log10(low)) * 0.08, 0.1)
        return low / 10**room, high * 10**room
    room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    return low - room, high + room


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in corners)
