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
    axes = _Axes(chart)
    return {
        "slug": chart.slug,
        "title": chart.title,
        "summary": chart.summary,
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "x_ticks": axes.x_ticks(chart.x_at),
        "y_ticks": axes.y_ticks(),
        "series": [_drawn_series(series, axes) for series in chart.series],
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
        "width": WIDTH,
        "height": HEIGHT,
    }


class _Axes:
    """Where values lie in the drawing: room for all points of a chart and their spreads."""

    def __init__(self, chart: Chart) -> None:
        points = [point for series in chart.series for point in series.points]
        self.log_x = chart.log_x
        self.x_ends = _range([p.x for p in points], chart.log_x)
        self.y_ends = _range([p.y + sign * (p.spread or 0.0) for p in points for sign in (-1, 1)])

    def x(self, value: float) -> float:
        """Return the distance from the left."""
        low, high = self.x_ends
        if self.log_x:
            return _across(place(math.log10(value), math.log10(low), math.log10(high)))
        return _across(place(value, low, high))

    def y(self, value: float) -> float:
        """Return the distance from the top."""
        low, high = self.y_ends
        return round(HEIGHT - BOTTOM - place(value, low, high) * (HEIGHT - TOP - BOTTOM), 1)

    def x_ticks(self, wanted: Sequence[float]) -> list[tuple[float, str]]:
        """Return ticks at the wanted values as percentages, or at round numbers."""
        low, high = self.x_ends
        if wanted:
            found = [(place(value, low, high), f"{value:.0%}") for value in wanted]
        else:
            found = log_ticks(low, high) if self.log_x else ticks(low, high)
        return [(_across(part), label) for part, label in found]

    def y_ticks(self) -> list[tuple[float, str]]:
        """Return ticks at round numbers."""
        low, high = self.y_ends
        return [(round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1), label) for part, label in ticks(low, high)]


def _across(part: float) -> float:
    return round(LEFT + part * (WIDTH - LEFT - RIGHT), 1)


def _drawn_series(series: Series, axes: _Axes) -> dict[str, Any]:
    points = series.points
    corners = [(axes.x(p.x), axes.y(p.y)) for p in points]
    band = [(axes.x(p.x), axes.y(p.y + (p.spread or 0.0))) for p in points]
    band += [(axes.x(p.x), axes.y(p.y - (p.spread or 0.0))) for p in reversed(points)]
    joined = series.line and len(corners) > 1
    bars = [(axes.x(p.x), axes.y(p.y - p.spread), axes.y(p.y + p.spread)) for p in points if p.spread]
    return {
        "name": series.name,
        "look": look_name(series.look),
        "marker": marker_name(series.look),
        "line": _path(_stepped(corners) if series.steps else corners) if joined else None,
        "band": _path(band) + "Z" if joined and any(p.spread for p in points) else None,
        "bars": [] if joined else bars,
        "small": series.small,
        "points": [(x, y, p.note) for (x, y), p in zip(corners, points, strict=True) if p.marked],
    }


def _stepped(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return corners of a line that stays level from one point to the next."""
    turns = [(after[0], before[1]) for before, after in pairwise(corners)]
    return [corner for pair in zip(corners, turns, strict=False) for corner in pair] + list(corners[-1:])


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
