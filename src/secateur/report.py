"""One HTML page for one pruning: what was kept, what it saved, what it cost, and how it was made.

The page is a single file that loads nothing: it can be mailed, archived or printed, and it opens without a network.
Python prepares every number here and the template only places them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.errors import invalid
from secateur.files import write_text

BINS = 32
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def write_report(data: dict[str, Any], path: str | Path) -> None:
    """Write `render_report(data)` to `path`, whole or not at all."""
    write_text(path, render_report(data))


def render_report(data: dict[str, Any]) -> str:
    """Return the page for `data`, which is plain JSON data.

    Only `sites` is required: a list of `{"name", "scores", "kept"}` in the order of the model, with one entry for each
    head, where `scores` or any of its entries may be null. The sections `cost`, `quality`, `times`, `proof`,
    `command`, `environment` and `notes` and the facts `title`, `model`, `created`, `secateur_version`, `scorer`,
    `scope` and `requested_ratio` are left out where they are absent. `kept`, `heads` and `pruning_ratio` are counted
    from the sites, and checked where given. The tiles show the first two entries of `cost` and the first of `quality`.

    Raises `InvalidInputError` where a part has another form or contradicts the sites.
    """
    if not isinstance(data, dict):
        raise invalid("data", "be a mapping of the report's sections", data)
    sites = _check_sites(data.get("sites"))
    kept, heads = sum(sum(site["kept"]) for site in sites), sum(len(site["kept"]) for site in sites)
    ratio = 1 - kept / heads
    for name, counted, tolerance in (("kept", kept, 0), ("heads", heads, 0), ("pruning_ratio", ratio, 0.005)):
        given = data.get(name)
        if given is not None and (not _is_number(given) or abs(given - counted) > tolerance):
            raise invalid(name, f"be {round(counted, 3)} as the sites say, or be left out", given)
    if data.get("requested_ratio") is not None and not _is_number(data["requested_ratio"]):
        raise invalid("requested_ratio", "be a number", data["requested_ratio"])

    known = [score for site in sites for score in site["scores"] if score is not None]
    bounds = (min(known), max(known)) if known else None
    rows = _head_map(sites, bounds)
    cost = [_cost(row) for row in _check_rows(data, "cost", ("dense", "pruned"))]
    quality = [_quality(row) for row in _check_rows(data, "quality", ("dense", "pruned"))]
    times = _check_rows(data, "times", ("seconds",))
    view = {
        "text": {key: data.get(key) for key in ("title", "model", "created", "scorer", "scope", "command")},
        "version": data.get("secateur_version"),
        "kept": kept,
        "heads": heads,
        "ratio": ratio,
        "requested": data.get("requested_ratio"),
        "tiles": [*cost[:2], *quality[:1]],
        "rows": rows,
        "looks": {(cell["look"], cell["verdict"]) for row in rows for cell in row["cells"]},
        "columns": max(len(site["kept"]) for site in sites),
        "bounds": bounds and [_signed(f"{bound:.3g}") for bound in bounds],
        "histogram": bounds and _histogram(sites, *bounds),
        "cost": cost,
        "quality": quality,
        "times": [{"name": row["name"], "value": _amount(row["seconds"], "s")} for row in times],
        "proof": _proof(data.get("proof")),
        "environment": _check_type(data, "environment", dict, "map names to values"),
        "notes": _check_type(data, "notes", list, "be a list of texts"),
    }
    # The names of models and sites come from outside: everything is escaped, whatever the template's suffix.
    environment = Environment(
        loader=PackageLoader("secateur"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(view)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_type(data: dict[str, Any], name: str, kind: type, rule: str) -> Any:
    """Return an optional section, empty where it is absent."""
    value = data.get(name)
    if value is not None and not isinstance(value, kind):
        raise invalid(name, rule, value)
    return kind() if value is None else value


def _check_sites(sites: object) -> list[dict[str, Any]]:
    """Return the sites with `scores` always a list, or raise `InvalidInputError`."""
    if not isinstance(sites, list) or not sites:
        raise invalid("sites", "be a list with at least one attention site", sites)
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
        if not all(score is None or _is_number(score) for score in scores):
            raise invalid(f"{where}.scores", "hold finite numbers or null", scores)
        checked[name] = {"name": name, "scores": scores, "kept": kept, "scored": site.get("scores") is not None}
    return list(checked.values())


def _check_rows(data: dict[str, Any], section: str, numbers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of an optional table after a check of their names and numbers; a number may be null."""
    rows = _check_type(data, section, list, "be a list of rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise invalid(f"{section}[{index}]", "be a mapping with a name", row)
        for key in numbers:
            if key not in row or not (row[key] is None or _is_number(row[key])):
                raise invalid(f"{section}[{index}].{key}", "be a finite number or null", row.get(key))
    return list(rows)


def _head_map(sites: list[dict[str, Any]], bounds: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Return a row for each site with a cell for each head: colours from 0 to 1 and the facts in words."""
    rows = []
    for site, label in zip(sites, _short_labels([site["name"] for site in sites]), strict=True):
        known = [score for score in site["scores"] if score is not None]
        cells = []
        for head, (score, kept) in enumerate(zip(site["scores"], site["kept"], strict=True)):
            verdict = "kept" if kept else "removed"
            # The scorers give a head that an earlier pruning removed no score; a site without any was never scored.
            gone = score is None and not kept and site["scored"]
            if score is None:
                facts = "removed by an earlier pruning" if gone else f"{verdict}, no score"
            else:
                rank = 1 + sum(other > score for other in known)
                facts = f"{verdict}, score {score:.4g}, rank {rank} of {len(known)} in its site"
            cells.append(
                {
                    "head": head,
                    "verdict": verdict,
                    "look": "gone" if gone else "blank" if score is None else "scored",
                    "facts": facts,
                    "in_model": f"{_place(score, *bounds):.3f}" if bounds and score is not None else "0",
                    "in_site": f"{_place(score, min(known), max(known)):.3f}" if score is not None else "0",
                }
            )
        rows.append({"name": site["name"], "label": label, "cells": cells, "kept": sum(site["kept"])})
    return rows


def _short_labels(names: list[str]) -> list[str]:
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


def _place(score: float, low: float, high: float) -> float:
    """Return where `score` lies between `low` (0) and `high` (1), and 0.5 where all scores are equal."""
    # Dividing first keeps the difference of two very large scores finite.
    scale = max(abs(low), abs(high)) or 1.0
    span = high / scale - low / scale
    return (score / scale - low / scale) / span if span else 0.5


def _histogram(sites: list[dict[str, Any]], low: float, high: float) -> dict[str, Any]:
    """Count the scores in equal bins: kept heads above the axis, removed ones below it."""
    counts = {"kept": [0] * BINS, "removed": [0] * BINS}
    for site in sites:
        for score, kept in zip(site["scores"], site["kept"], strict=True):
            if score is not None:
                counts["kept" if kept else "removed"][min(int(_place(score, low, high) * BINS), BINS - 1)] += 1
    top = max(max(row) for row in counts.values())
    bars = [
        {"side": side, "x": 100 * index / BINS, "share": count / top, "count": count}
        for side, row in counts.items()
        for index, count in enumerate(row)
        if count
    ]
    totals = {side: sum(row) for side, row in counts.items()}
    return {"bars": bars, "width": 100 / BINS, "top": top, "totals": totals, "ticks": _ticks(low, high)}


def _ticks(low: float, high: float) -> list[dict[str, Any]]:
    """Return about five round numbers between `low` and `high`, with their places in percent."""
    span = high - low
    if low == high:
        return [{"x": 50.0, "label": _signed(f"{low:.3g}")}]
    if not max(1e-6 * max(abs(low), abs(high)), 1e-300) < span < math.inf:
        # Round numbers need a range that floating point resolves well; the ends serve for any other.
        return [{"x": 100.0 * end, "label": _signed(f"{(low, high)[end]:.6g}")} for end in (0, 1)]
    exponent = math.floor(math.log10(span / 4))
    step = next(m for m in (1, 2, 5, 10) if m * 10.0**exponent >= span / 5) * 10.0**exponent
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step)))
    form = f".{decimals}f" if decimals <= 4 and abs(high) < 1e6 else ".3g"
    return [{"x": 100 * _place(value, low, high), "label": _signed(f"{value:{form}}")} for value in values]


def _cost(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the cost table in words, with the ratio and a short form for its tile."""
    dense, pruned, unit = row["dense"], row["pruned"], str(row.get("unit") or "")
    ratio = pruned / dense if dense and pruned is not None else None
    return {
        "name": row["name"],
        "note": row.get("note"),
        "dense": _amount(dense, unit, dense),
        "pruned": _amount(pruned, unit, dense),
        "ratio": DASH if ratio is None else f"{ratio:.3f}",
        "bar": None if ratio is None else f"{100 * min(max(ratio, 0.0), 1.0):.1f}",
        "change": DASH if ratio is None else _change(100 * (ratio - 1), ".1f") + " %",
        "brief": _brief(pruned, unit, dense),
        "brief_dense": _brief(dense, unit, dense),
    }


def _quality(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the quality table in words; the change is a difference, for a metric's ratio says little."""
    dense, pruned = row["dense"], row["pruned"]
    both = [abs(x) for x in (dense, pruned) if x]
    form = ".2e" if both and max(both) < 0.001 else ".3f"
    shown = {key: DASH if row[key] is None else _signed(f"{row[key]:{form}}") for key in ("dense", "pruned")}
    change = DASH if dense is None or pruned is None else _change(pruned - dense, form)
    return {
        "name": row["name"],
        "note": row.get("note"),
        **shown,
        "change": change,
        "brief": shown["pruned"],
        "brief_dense": shown["dense"],
    }


def _proof(proof: object) -> dict[str, Any] | None:
    if proof is None:
        return None
    if not isinstance(proof, dict) or not all(_is_number(proof.get(key)) for key in ("max_difference", "tolerance")):
        raise invalid("proof", "hold the numbers max_difference and tolerance", proof)
    return {
        "difference": f"{proof['max_difference']:.2g}".replace("e-0", "e-"),
        "tolerance": f"{proof['tolerance']:.2g}".replace("e-0", "e-"),
        "probe": proof.get("probe"),
        "holds": proof["max_difference"] <= proof["tolerance"],
    }


def _amount(value: float | None, unit: str, like: float | None = None) -> str:
    """Return a number with its unit; times get the unit that suits `like`, so that two columns share one."""
    if value is None:
        return DASH
    if unit == "s":
        size = abs(value if like is None else like)
        factor, name = (1.0, "s") if size >= 1 or not size else (1e3, "ms") if size >= 1e-3 else (1e6, "µs")
        scaled = value * factor
        return f"{_signed(f'{scaled:,.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}')} {name}"
    shown = f"{int(value):,}" if value == int(value) else f"{value:,.4g}"
    return f"{_signed(shown)} {unit}".strip()


def _brief(value: float | None, unit: str, like: float | None = None) -> str:
    """Return three digits and a letter for thousands, millions and so on."""
    if value is None or unit == "s" or abs(value) < 1000:
        return _amount(value, unit, like)
    power = min(int(math.log10(abs(value)) / 3), 5)
    return f"{_signed(f'{value / 1000**power:.3g}')} {'kMGTP'[power - 1]} {unit}".strip()


def _change(value: float, form: str) -> str:
    shown = f"{value:+{form}}"
    return _signed(shown if float(shown) else shown[1:])


def _signed(number: str) -> str:
    """Write a leading hyphen as the minus sign that screens and fonts treat as a part of the number."""
    return MINUS + number[1:] if number.startswith("-") else number
