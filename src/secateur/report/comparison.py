"""One comparison: quality by pruning ratio, what scoring costs, how far scorers agree, and what is noise."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from secateur.comparing.summary import ALL_TASKS, Summary, summarise
from secateur.report.charts import DENSE_LOOK, RANDOM_LOOK, Chart, Point, Series, drawn, look_name, marker_name
from secateur.report.head_map import histogram
from secateur.report.numbers import DASH, amount, change, place, signed

DENSE, RANDOM = "dense", "random"


def comparison_view(data: dict[str, Any]) -> dict[str, Any]:
    """Return what the template places for one comparison: `rows` of runs.jsonl, `settings`, and `scores` by file."""
    rows, settings = data["rows"], data["settings"]
    summaries = summarise(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    ratios, seeds = sorted({row["ratio"] for row in rows} - {0.0}), {row["seed"] for row in rows}
    scorers = scorers_of(rows)
    whole = ALL_TASKS if len(tasks) > 1 else tasks[0]
    best = max(
        (s for s in summaries if s.retention is not None and s.task == whole),
        key=lambda s: s.retention or 0.0,
        default=None,
    )
    tiles = [{"name": "finished runs", "value": f"{len(rows):,}", "note": f"{len(scorers)} scorers and dense"}]
    for title, chosen in (("highest retention", best), ("retention of random heads", _random_at(summaries, best))):
        if chosen is not None and chosen.retention is not None:
            note = f"{chosen.scorer}, {chosen.ratio:.0%} removed"
            tiles.append({"name": title, "value": f"{chosen.retention:.1%}", "note": note})
    shared = {name: settings.get(name) for name in ("model", "protocol", "allocation")}
    facts = [(name.capitalize(), value) for name, value in shared.items() if value]
    facts += [("Removed", ", ".join(f"{ratio:.0%}" for ratio in ratios)), ("Seeds", str(len(seeds)))]
    restored = ["output projections refitted"] if settings.get("restore", "none") != "none" else []
    restored += [f"distilled in {settings['steps']} steps"] if settings.get("restore") == "distill" else []
    facts += [("Before fine-tuning", ", ".join(restored))] if restored else []
    environment = dict(rows[-1].get("environment") or {})
    counted = _count(len(scorers), "scorer"), _count(len(tasks), "task"), _count(len(seeds), "seed")
    return {
        "kind": "comparison",
        "title": "secateur compare",
        "name": data["name"],
        "headline": f"{counted[0]} compared on {counted[1]}, {counted[2]}",
        "facts": facts,
        "tiles": tiles,
        "legend": [
            {"name": name, "look": look_name(look), "marker": marker_name(look)}
            for name, look in [(DENSE, DENSE_LOOK), *looks(rows).items()]
        ],
        "curves": [drawn(chart) for chart in curves(rows, summaries)],
        "costs": [drawn(chart) for chart in cost_charts(rows, summaries)],
        "table": _table(summaries, tasks),
        "work": _work(rows, scorers),
        "agreement": agreement(rows, data["scores"]),
        "histograms": _histograms(rows, data["scores"]),
        "environment": environment,
        "settings": {name: _words(value) for name, value in settings.items() if value not in (None, [], {})},
    }


def scorers_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the scorers in the order of the rows."""
    return [name for name in dict.fromkeys(row["scorer"] for row in rows) if name != DENSE]


def looks(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the look of every scorer: random heads have one of their own, the others are counted."""
    named = [name for name in scorers_of(rows) if name != RANDOM]
    return {name: RANDOM_LOOK if name == RANDOM else named.index(name) for name in scorers_of(rows)}


def curves(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Chart]:
    """Return a chart of quality by ratio for each task, and of retention where there are several; dense is ratio 0."""
    ratios = (0.0, *sorted({row["ratio"] for row in rows} - {0.0}))
    metrics = {row["task"]: row["metric"] for row in rows}
    charts = []
    for task in dict.fromkeys(s.task for s in summaries):
        dense = next((s for s in summaries if s.task == task and s.scorer == DENSE), None)
        all_tasks = task == ALL_TASKS
        series = []
        for scorer, look in looks(rows).items():
            found = [s for s in summaries if s.task == task and s.scorer == scorer]
            if all_tasks:
                points = [Point(0, 1.0, 0.0, marked=False)] if dense else []
                points += [
                    Point(s.ratio, s.retention, _spread_of_retention(rows, s), _said(s, retention=True))
                    for s in found
                    if s.retention is not None
                ]
            else:
                points = [Point(0, dense.mean, dense.std, marked=False)] if dense else []
                points += [Point(s.ratio, s.mean, s.std, _said(s)) for s in found]
            if len(points) > (dense is not None):
                series.append(Series(scorer, look, sorted(points, key=lambda p: p.x)))
        if not series:
            continue
        if dense is not None:
            start = Point(0, 1.0, note="dense: 100%") if all_tasks else Point(0, dense.mean, dense.std, _said(dense))
            series.append(Series(DENSE, DENSE_LOOK, [start], line=False))
        title = "mean retention" if all_tasks else task
        label = "pruned / dense" if all_tasks else str(metrics[task])
        last = "; ".join(f"{one.name} {one.points[-1].y:.3f}" for one in series if one.name != DENSE)
        summary = f"{title} by pruning ratio. At the highest ratio: {last}"
        slug = "curve-" + re.sub(r"[^\w.-]+", "-", title).strip("-")
        charts.append(Chart(slug, title, summary, "heads removed", label, series, x_at=ratios))
    return charts


def cost_charts(rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]) -> list[Chart]:
    """Return, for each ratio, a chart of mean retention against the seconds that scoring took, on a log scale."""
    tasks = {row["task"] for row in rows}
    charts = []
    for ratio in sorted({row["ratio"] for row in rows} - {0.0}):
        series = []
        for scorer, look in looks(rows).items():
            own = [r for r in rows if (r["scorer"], r["ratio"]) == (scorer, ratio)]
            seconds = [s for r in own if (s := r["cost"].get("scoring_seconds")) is not None and s > 0]
            wanted = ALL_TASKS if len(tasks) > 1 else next(iter(tasks))
            found = next((s for s in summaries if (s.task, s.scorer, s.ratio) == (wanted, scorer, ratio)), None)
            if seconds and found is not None and found.retention is not None:
                mean = statistics.mean(seconds)
                note = f"{scorer}: {found.retention:.1%} kept, {amount(mean, 's')} to score"
                point = Point(mean, found.retention, _spread_of_retention(rows, found), note)
                series.append(Series(scorer, look, [point], line=False))
        if series:
            said = "; ".join(one.points[0].note for one in series)
            charts.append(
                Chart(
                    f"cost-{ratio:g}", f"{ratio:.0%} of the heads removed", said, "seconds to score the heads",
                    "pruned / dense", series, log_x=True,
                )
            )  # fmt: skip
    return charts


def agreement(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return matrices of scorers: the share of kept heads in common for each ratio, and the rank correlation.

    Overlap is 2 |A and B| / (|A| + |B|) over the model's heads, rank correlation is Spearman's within each site; both
    are means over tasks and seeds. A cell is None where two scorers share no task and seed.
    """
    scorers, matrices = scorers_of(rows), []
    for ratio in sorted({row["ratio"] for row in rows} - {0.0}):
        kept = {
            (r["scorer"], r["task"], r["seed"]): {(s, h) for s, row in r["kept_heads"].items() for h in row}
            for r in rows
            if r["ratio"] == ratio and r.get("kept_heads")
        }
        title = f"kept heads in common, {ratio:.0%} removed"
        note = f"Two random choices would have about {1 - ratio:.0%} in common."
        matrices.append(_matrix(title, note, scorers, kept, _overlap, f"overlap-{ratio:g}"))
    tasks, seeds = {row["task"] for row in rows}, {row["seed"] for row in rows}
    vectors = {
        (scorer, task, seed): found
        for scorer in scorers
        for task in tasks
        for seed in seeds
        if (found := _scores_of(scores, scorer, task, seed))
    }
    note = "Spearman within each site: 1 is the same order, 0 none, and \N{MINUS SIGN}1 the opposite."
    matrices.append(
        _matrix("rank correlation of scores", note, scorers, vectors, _rank_correlation, "rank-correlation")
    )
    return [matrix for matrix in matrices if len(matrix["names"]) > 1]


def _matrix(
    title: str, note: str, scorers: Sequence[str], values: Mapping[tuple[str, str, int], Any], compare: Any, slug: str
) -> dict[str, Any]:
    names = [name for name in scorers if any(key[0] == name for key in values)]
    cells: list[list[float | None]] = []
    for one in names:
        row: list[float | None] = []
        for other in names:
            places = [key[1:] for key in values if key[0] == one and (other, *key[1:]) in values]
            found = [compare(values[(one, *p)], values[(other, *p)]) for p in places]
            found = [x for x in found if x is not None]
            row.append(statistics.mean(found) if found else None)
        cells.append(row)
    shown = [
        [(DASH, "0") if x is None else (signed(f"{x:.2f}"), f"{min(max(x, 0.0), 1.0):.2f}") for x in row]
        for row in cells
    ]
    return {"slug": slug, "title": title, "note": note, "names": names, "values": cells, "cells": shown}


def _overlap(one: set[Any], other: set[Any]) -> float | None:
    return 2 * len(one & other) / (len(one) + len(other)) if one or other else None


def _rank_correlation(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    found = []
    for site, row in one.items():
        pairs = [(a, b) for a, b in zip(row, other.get(site, []), strict=False) if a is not None and b is not None]
        left, right = [a for a, _ in pairs], [b for _, b in pairs]
        if len(set(left)) > 1 and len(set(right)) > 1:  # elsewhere there is no order to compare
            found.append(float(spearmanr(left, right).statistic))
    return statistics.mean(found) if found else None


def _scores_of(scores: Mapping[str, Any], scorer: str, task: str, seed: int, ratio: float | None = None) -> Any:
    """Return the scores by site; of a scorer with scores for each ratio, those for `ratio`, or for the lowest."""
    stem = f"{task.replace('/', '-')}-{scorer}"
    if ratio is not None and f"{stem}-{ratio:g}-{seed}" in scores:
        return scores[f"{stem}-{ratio:g}-{seed}"]
    if f"{stem}-{seed}" in scores:
        return scores[f"{stem}-{seed}"]
    ratios = [name for name in scores if name.startswith(f"{stem}-0.") and name.endswith(f"-{seed}")]
    return scores[min(ratios)] if ratios else None


def _histograms(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a distribution for each scorer at the ratio nearest to half: each file's scores from lowest to highest."""
    ratios = {row["ratio"] for row in rows} - {0.0}
    ratio = min(ratios, key=lambda r: (abs(r - 0.5), r), default=0.5)
    found = []
    for scorer in scorers_of(rows):
        sites = []
        for row in rows:
            own = _scores_of(scores, scorer, row["task"], row["seed"], ratio)
            if (row["scorer"], row["ratio"]) != (scorer, ratio) or not own or not row.get("kept_heads"):
                continue
            known = [x for line in own.values() for x in line if x is not None]
            if known and min(known) < max(known):
                low, high = min(known), max(known)
                for site, line in own.items():
                    kept = [head in row["kept_heads"].get(site, []) for head in range(len(line))]
                    sites.append({"scores": [None if x is None else place(x, low, high) for x in line], "kept": kept})
        if sites:
            found.append({"name": scorer, "ratio": f"{ratio:.0%}", **histogram(sites, 0.0, 1.0)})
    return found


def _table(summaries: Sequence[Summary], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the comparison in words: a row for each ratio and scorer, a cell for each task."""
    columns = [*tasks, *([ALL_TASKS] if len(tasks) > 1 else [])]
    by_cell = {(s.scorer, s.ratio, s.task): s for s in summaries}
    rows = []
    for scorer, ratio in sorted(dict.fromkeys((s.scorer, s.ratio) for s in summaries), key=lambda key: key[1]):
        cells = [by_cell.get((scorer, ratio, task)) for task in columns]
        kept = None if cells[-1] is None else cells[-1].retention
        rows.append(
            {
                "scorer": scorer,
                "ratio": f"{ratio:.0%}",
                "cells": [_cell(cell) for cell in cells],
                "retention": DASH if kept is None else f"{kept:.1%}",
            }
        )
    return {"columns": columns, "rows": rows, "runs": sorted({s.runs for s in summaries if s.task != ALL_TASKS})}


def _cell(summary: Summary | None) -> dict[str, Any]:
    if summary is None:
        return {"mean": DASH, "difference": None}
    spread = "" if summary.std is None else f" ± {summary.std:.3f}"
    cell: dict[str, Any] = {"mean": f"{summary.mean:.3f}{spread}", "difference": None}
    if summary.difference is not None:
        noise, p = summary.is_noise, summary.p_value
        cell["difference"] = change(summary.difference, ".3f")
        cell["p"] = None if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        beyond = "lower" if summary.difference < 0 else "higher"
        cell["verdict"] = "unknown" if noise is None else "noise" if noise else beyond
    return cell


def _work(rows: Sequence[Mapping[str, Any]], scorers: Sequence[str]) -> list[dict[str, Any]]:
    """Return what each scorer took: mean seconds to score, and to fine-tune, beside the dense model's."""
    found = []
    dense = [r["cost"].get("training_seconds") for r in rows if r["scorer"] == DENSE]
    base = statistics.mean(x for x in dense if x is not None) if any(dense) else None
    for name in [DENSE, *scorers]:
        by_ratio: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["scorer"] == name:
                by_ratio[row["ratio"]].append(row["cost"])
        for ratio, costs in sorted(by_ratio.items()):
            means = {}
            for key in ("scoring_seconds", "training_seconds"):
                values = [c[key] for c in costs if c.get(key) is not None]
                means[key] = statistics.mean(values) if values else None
            training = means["training_seconds"]
            found.append(
                {
                    "scorer": name,
                    "ratio": f"{ratio:.0%}",
                    "scoring": amount(means["scoring_seconds"], "s"),
                    "training": amount(training, "s"),
                    "share": DASH if not base or training is None else f"{training / base:.2f}",
                }
            )
    return found


def _spread_of_retention(rows: Sequence[Mapping[str, Any]], summary: Summary) -> float | None:
    """Return the standard deviation over seeds of pruned / dense, averaged over tasks first."""
    values = {(r["task"], r["scorer"], r["ratio"], r["seed"]): r["value"] for r in rows}
    tasks = dict.fromkeys(r["task"] for r in rows) if summary.task == ALL_TASKS else [summary.task]
    means = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        pairs = [
            (values.get((task, summary.scorer, summary.ratio, seed)), values.get((task, DENSE, 0.0, seed)))
            for task in tasks
        ]
        shares = [pruned / dense for pruned, dense in pairs if pruned is not None and dense]
        if len(shares) == len(pairs):
            means.append(statistics.mean(shares))
    return statistics.stdev(means) if len(means) > 1 else None


def _random_at(summaries: Sequence[Summary], best: Summary | None) -> Summary | None:
    if best is None or best.scorer == "random":
        return None
    return next((s for s in summaries if (s.scorer, s.ratio, s.task) == ("random", best.ratio, best.task)), None)


def _said(summary: Summary, retention: bool = False) -> str:
    value = f"{summary.retention:.1%}" if retention and summary.retention is not None else f"{summary.mean:.3f}"
    spread = "" if summary.std is None or retention else f" ± {summary.std:.3f}"
    return f"{summary.scorer}, {summary.ratio:.0%} removed: {value}{spread}, {_count(summary.runs, 'seed')}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} = {_words(part)}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
