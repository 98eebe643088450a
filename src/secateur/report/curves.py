"""The charts of a comparison: quality by pruning ratio, and retention by what scoring took."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.comparing.plan import DENSE
from secateur.comparing.summary import ALL_TASKS, Summary, dense_values, pruning_ratios, scorers_of
from secateur.report.charts import DENSE_LOOK, RANDOM_LOOK, Chart, Point, Series
from secateur.report.numbers import amount, counted

RANDOM = "random"
"""The scorer that every other must beat."""


def looks(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the look of every scorer: random heads have one of their own, the others are counted."""
    scorers = scorers_of(rows)
    named = [name for name in scorers if name != RANDOM]
    return {name: RANDOM_LOOK if name == RANDOM else named.index(name) for name in scorers}


def curves(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Chart]:
    """Return a chart of quality by ratio for each task, and of retention where there are several; dense is ratio 0."""
    metrics = {row["task"]: str(row["metric"]) for row in rows}
    charts = []
    for task in dict.fromkeys(s.task for s in summaries):
        own = [s for s in summaries if s.task == task]
        is_mean = task == ALL_TASKS
        series = _retention_series(rows, own) if is_mean else _metric_series(rows, own)
        if all(one.name == DENSE for one in series):
            continue
        title = "mean retention" if is_mean else task
        last = "; ".join(f"{one.name} {one.points[-1].y:.3f}" for one in series if one.name != DENSE)
        charts.append(
            Chart(
                slug="curve-" + re.sub(r"[^\w.-]+", "-", title).strip("-"),
                title=title,
                summary=f"{title} by pruning ratio. At the highest ratio: {last}",
                x_label="heads removed",
                y_label="pruned / dense" if is_mean else metrics[task],
                series=series,
                x_at=(0.0, *pruning_ratios(rows)),
            )
        )
    return charts


def _metric_series(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Series]:
    """Return a line of the metric for each scorer of one task, and the dense model's point."""
    dense = next((s for s in summaries if s.scorer == DENSE), None)
    points = {
        scorer: [Point(s.ratio, s.mean, s.std, _note(s)) for s in summaries if s.scorer == scorer]
        for scorer in scorers_of(rows)
    }
    start = None if dense is None else Point(0, dense.mean, dense.std, _note(dense))
    return _series(rows, points, start)


def _retention_series(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Series]:
    """Return a line of the retention for each scorer over all tasks, and the dense model's point."""
    points = {
        scorer: [
            Point(s.ratio, s.retention, _spread_of_retention(rows, s), _note(s, retention=True))
            for s in summaries
            if s.scorer == scorer and s.retention is not None
        ]
        for scorer in scorers_of(rows)
    }
    has_dense = any(s.scorer == DENSE for s in summaries)
    return _series(rows, points, Point(0, 1.0, 0.0, "dense: 100%") if has_dense else None)


def _series(
    rows: Sequence[Mapping[str, Any]], points: Mapping[str, list[Point]], dense: Point | None
) -> list[Series]:  # fmt: skip
    """Join the points of each scorer that has some, from the dense model's on, which then stands by itself."""
    start = [] if dense is None else [Point(0, dense.y, dense.spread, marked=False)]
    found = [
        Series(scorer, look, sorted(start + points[scorer], key=lambda p: p.x))
        for scorer, look in looks(rows).items()
        if points[scorer]
    ]
    return found if dense is None else [*found, Series(DENSE, DENSE_LOOK, [dense], line=False)]


def cost_charts(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Chart]:
    """Return, for each ratio, a chart of mean retention against the seconds that scoring took, on a log scale."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    task = ALL_TASKS if len(tasks) > 1 else tasks[0]
    charts = []
    for ratio in pruning_ratios(rows):
        series = []
        for scorer, look in looks(rows).items():
            own = [r for r in rows if (r["scorer"], r["ratio"]) == (scorer, ratio)]
            seconds = [s for r in own if (s := r["cost"].get("scoring_seconds")) is not None and s > 0]
            found = next((s for s in summaries if (s.task, s.scorer, s.ratio) == (task, scorer, ratio)), None)
            if seconds and found is not None and found.retention is not None:
                mean = statistics.mean(seconds)
                note = f"{scorer}: {found.retention:.1%} kept, {amount(mean, 's')} to score"
                point = Point(mean, found.retention, _spread_of_retention(rows, found), note)
                series.append(Series(scorer, look, [point], line=False))
        if series:
            charts.append(
                Chart(
                    slug=f"cost-{ratio:g}",
                    title=f"{ratio:.0%} of the heads removed",
                    summary="; ".join(one.points[0].note for one in series),
                    x_label="seconds to score the heads",
                    y_label="pruned / dense",
                    series=series,
                    log_x=True,
                )
            )
    return charts


def _spread_of_retention(rows: Sequence[Mapping[str, Any]], summary: Summary) -> float | None:
    """Return the standard deviation over seeds of pruned / dense, averaged over the tasks that count first."""
    values = {(r["task"], r["scorer"], r["ratio"], r["seed"]): r["value"] for r in rows}
    dense = dense_values(rows)
    counting = dict.fromkeys(task for task, _ in dense)
    tasks = counting if summary.task == ALL_TASKS else [summary.task]
    means = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        pairs = [(values.get((task, summary.scorer, summary.ratio, seed)), dense.get((task, seed))) for task in tasks]
        shares = [pruned / base for pruned, base in pairs if pruned is not None and base]
        if shares and len(shares) == len(pairs):
            means.append(statistics.mean(shares))
    return statistics.stdev(means) if len(means) > 1 else None


def _note(summary: Summary, retention: bool = False) -> str:
    value = f"{summary.retention:.1%}" if retention and summary.retention is not None else f"{summary.mean:.3f}"
    spread = "" if summary.std is None or retention else f" ± {summary.std:.3f}"
    return f"{summary.scorer}, {summary.ratio:.0%} removed: {value}{spread}, {counted(summary.runs, 'seed')}"
