"""One comparison: quality by pruning ratio, what scoring costs, how far scorers agree, and what is noise."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.comparing.plan import DENSE
from secateur.comparing.summary import ALL_TASKS, Summary, not_learned, pruning_ratios, scorers_of, summarise
from secateur.report.agreement import agreement, histograms
from secateur.report.charts import DENSE_LOOK, drawn, look_name, marker_name
from secateur.report.curves import RANDOM, cost_charts, curves, looks
from secateur.report.numbers import DASH, amount, change, counted
from secateur.report.relational_kl import restored_words


def comparison_view(data: dict[str, Any]) -> dict[str, Any]:
    """Return what the template places for one comparison: `rows` of runs.jsonl, `settings`, and `scores` by file."""
    rows, settings = data["rows"], data["settings"]
    summaries = summarise(rows)
    tasks, scorers = list(dict.fromkeys(row["task"] for row in rows)), scorers_of(rows)
    seeds = len({row["seed"] for row in rows})
    sizes = counted(len(scorers), "scorer"), counted(len(tasks), "task"), counted(seeds, "seed")
    return {
        "kind": "comparison",
        "title": "secateur compare",
        "name": data["name"],
        "headline": f"{sizes[0]} compared on {sizes[1]}, {sizes[2]}",
        "facts": _facts(rows, settings, seeds),
        "not_learned": not_learned(rows),
        "tiles": _tiles(rows, summaries, tasks),
        "legend": [
            {"name": name, "look": look_name(look), "marker": marker_name(look)}
            for name, look in [(DENSE, DENSE_LOOK), *looks(rows).items()]
        ],
        "curves": [drawn(chart) for chart in curves(rows, summaries)],
        "costs": [drawn(chart) for chart in cost_charts(rows, summaries)],
        "table": _table(summaries, tasks),
        "work": _work(rows, scorers),
        "agreement": agreement(rows, data["scores"]),
        "histograms": histograms(rows, data["scores"]),
        "environment": dict(rows[-1].get("environment") or {}),
        "settings": {name: _words(value) for name, value in settings.items() if value not in (None, [], {})},
    }


def _facts(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], seeds: int
) -> list[tuple[str, str]]:  # fmt: skip
    named = {name: settings.get(name) for name in ("model", "protocol", "allocation")}
    facts = [(name.capitalize(), value) for name, value in named.items() if value]
    facts += [("Removed", ", ".join(f"{ratio:.0%}" for ratio in pruning_ratios(rows))), ("Seeds", str(seeds))]
    restored = restored_words(settings.get("restore", "none"), settings.get("steps"))
    return facts + ([("Before fine-tuning", restored)] if restored else [])


def _tiles(
    rows: Sequence[Mapping[str, Any]], summaries: Sequence[Summary], tasks: Sequence[str]
) -> list[dict[str, str]]:  # fmt: skip
    """Return how many runs there are, the highest retention, and that of random heads at the same ratio."""
    whole = ALL_TASKS if len(tasks) > 1 else tasks[0]
    best = max(
        (s for s in summaries if s.retention is not None and s.task == whole),
        key=lambda s: s.retention or 0.0,
        default=None,
    )
    tiles = [
        {"name": "finished runs", "value": f"{len(rows):,}", "note": f"{len(scorers_of(rows))} scorers and dense"}
    ]  # fmt: skip
    for title, chosen in (("highest retention", best), ("retention of random heads", _random_at(summaries, best))):
        if chosen is not None and chosen.retention is not None:
            note = f"{chosen.scorer}, {chosen.ratio:.0%} removed"
            tiles.append({"name": title, "value": f"{chosen.retention:.1%}", "note": note})
    return tiles


def _random_at(summaries: Sequence[Summary], best: Summary | None) -> Summary | None:
    if best is None or best.scorer == RANDOM:
        return None
    return next((s for s in summaries if (s.scorer, s.ratio, s.task) == (RANDOM, best.ratio, best.task)), None)


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


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} = {_words(part)}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
