"""The head map and the distribution of scores: a cell for each head, and how many heads have which score."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from secateur.errors import invalid
from secateur.report.numbers import place, ticks
from secateur.support.checks import is_number
from secateur.units.grid import short_labels

BINS = 32
MOST_HEADS = 50_000
"""Of all sites: a page with more is too large for a browser, and no model has them."""


def check_sites(sites: object) -> list[dict[str, Any]]:
    """Return the sites with `scores` always a list, or raise `InvalidInputError`."""
    if not isinstance(sites, list) or not sites:
        raise invalid("sites", "be a list with at least one attention site", sites)
    heads = sum(len(site["kept"]) for site in sites if isinstance(site, dict) and isinstance(site.get("kept"), list))
    if heads > MOST_HEADS:
        raise invalid("sites", f"hold at most {MOST_HEADS} heads for one page", heads, "give fewer sites")
    checked: dict[str, dict[str, Any]] = {}
    for index, site in enumerate(sites):
        where = f"sites[{index}]"
        if not isinstance(site, dict) or not isinstance(site.get("name"), str) or not site["name"]:
            raise invalid(where, "be a mapping with a name, scores and kept", site)
        name, kept, scores = site["name"], site.get("kept"), site.get("scores")
        if name in checked:
            raise invalid(f"{where}.name", "differ from every other site's name", name)
        if not isinstance(kept, list) or not kept or not all(isinstance(entry, bool) for entry in kept):
            raise invalid(f"{where}.kept", "be a list with true or false for each head", kept)
        if scores is None:
            scores = [None] * len(kept)
        elif not isinstance(scores, list) or len(scores) != len(kept):
            raise invalid(f"{where}.scores", f"be null or a list of {len(kept)} scores, as many as `kept` has", scores)
        if not all(score is None or is_number(score) for score in scores):
            raise invalid(f"{where}.scores", "hold finite numbers or null", scores)
        checked[name] = {"name": name, "scores": scores, "kept": kept, "scored": site.get("scores") is not None}
    return list(checked.values())


def gone_before(site: dict[str, Any]) -> list[bool]:
    """Return which heads of a checked site an earlier pruning had removed.

    The scorers give such a head no score; a site without any was never scored.
    """
    return [site["scored"] and score is None and not k for score, k in zip(site["scores"], site["kept"], strict=True)]


def head_map(
    sites: list[dict[str, Any]], bounds: tuple[float, float] | None, decided: bool = True
) -> list[dict[str, Any]]:
    """Return a row for each site with a cell for each head: colours from 0 to 1 and the facts in words.

    `decided` says whether heads are kept or removed, or only scored.
    """
    rows = []
    for site, label in zip(sites, short_labels([site["name"] for site in sites]), strict=True):
        known = [score for score in site["scores"] if score is not None]
        ordered, cells = sorted(known), []
        for head, (score, kept, gone) in enumerate(zip(site["scores"], site["kept"], gone_before(site), strict=True)):
            verdict = "kept" if kept else "removed"
            if score is None:
                facts = "removed by an earlier pruning" if gone else f"{verdict}, no score"
            else:
                rank = 1 + len(ordered) - bisect_right(ordered, score)
                facts = f"{verdict}, " if decided else ""
                facts += f"score {score:.4g}, rank {rank} of {len(known)} in its site"
            cells.append(
                {
                    "head": head,
                    "verdict": verdict,
                    "look": "gone" if gone else "blank" if score is None else "scored",
                    "facts": facts,
                    "in_model": f"{place(score, bounds[0], bounds[1]):.3f}" if bounds and score is not None else "0",
                    "in_site": f"{place(score, min(known), max(known)):.3f}" if score is not None else "0",
                }
            )
        rows.append({"name": site["name"], "label": label, "cells": cells, "kept": sum(site["kept"])})
    return rows


def histogram(sites: list[dict[str, Any]], low: float, high: float) -> dict[str, Any]:
    """Count the scores in equal bins: kept heads above the axis, removed ones below it."""
    counts = {"kept": [0] * BINS, "removed": [0] * BINS}
    for site in sites:
        for score, kept in zip(site["scores"], site["kept"], strict=True):
            if score is not None:
                counts["kept" if kept else "removed"][min(int(place(score, low, high) * BINS), BINS - 1)] += 1
    top = max(max(row) for row in counts.values())
    bars = [
        {"side": side, "x": 100 * index / BINS, "share": count / top, "count": count}
        for side, row in counts.items()
        for index, count in enumerate(row)
        if count
    ]
    totals = {side: sum(row) for side, row in counts.items()}
    places = [{"x": 100 * part, "label": label} for part, label in ticks(low, high)]
    return {"bars": bars, "width": 100 / BINS, "top": top, "totals": totals, "ticks": places}
