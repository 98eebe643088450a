"""How far the scorers of a comparison agree: kept heads in common, rank correlation, and how their scores lie."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from secateur.comparing.summary import pruning_ratios, scorers_of
from secateur.report.head_map import histogram
from secateur.report.numbers import DASH, place, signed
from secateur.support.run_files import scores_stem


def agreement(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return matrices of scorers: the share of kept heads in common for each ratio, and the rank correlation.

    Overlap is 2 |A and B| / (|A| + |B|) over the model's heads, rank correlation is Spearman's within each site; both
    are means over tasks and seeds. A cell is None where two scorers share no task and seed.
    """
    scorers, matrices = scorers_of(rows), []
    for ratio in pruning_ratios(rows):
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


def histograms(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a distribution for each scorer at the ratio nearest to half: each file's scores from lowest to highest."""
    ratio = min(pruning_ratios(rows), key=lambda r: (abs(r - 0.5), r), default=0.5)
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


def _scores_of(scores: Mapping[str, Any], scorer: str, task: str, seed: int, ratio: float | None = None) -> Any:
    """Return the scores by site; of a scorer with scores for each ratio, those for `ratio`, or for the lowest."""
    wanted = [] if ratio is None else [scores_stem(task, scorer, seed, ratio)]
    for stem in [*wanted, scores_stem(task, scorer, seed)]:
        if stem in scores:
            return scores[stem]
    before, after = f"{scores_stem(task, scorer, seed).removesuffix(f'-{seed}')}-0.", f"-{seed}"
    ratios = [name for name in scores if name.startswith(before) and name.endswith(after)]
    return scores[min(ratios)] if ratios else None
