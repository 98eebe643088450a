"""One pruning, or the scores that came before one: what was kept, what it saved, what it cost, how it was done."""

from __future__ import annotations

from typing import Any

from secateur.errors import invalid, shown
from secateur.report.charts import Chart, Point, Series, drawn
from secateur.report.head_map import check_sites, gone_before, head_map, histogram
from secateur.report.numbers import DASH, amount, brief, change, signed
from secateur.support.checks import is_number


def pruning_view(data: dict[str, Any]) -> dict[str, Any]:
    """Return what the template places for one pruning, or for scores alone where `kind` is "scores".

    Only `sites` is required, or `blocks`, rows of what neurons and layers a block had and kept: a list of `{"name",
    "scores", "kept"}` in the order of the model, with one entry for each head, where `scores` or any of its entries may
    be null. The sections `units` (of each kind how many there were, and are), `cost`, `quality`, `times`, `proof`,
    `refinement`, `attention_maps`, `loading`, `command`, `environment` and `notes` and the facts `title`, `model`,
    `created`, `scorer`, `allocation`, `budget` and `requested_ratio` are left out where they are absent. `kept`,
    `heads` and `pruning_ratio` are counted from the sites, and checked where they are said. The tiles show what stays
    of heads, the first two entries of `cost` and its latency, or all but the parameters where more than heads go, and
    `quality`.

    Raises `InvalidInputError` where a part has another form or contradicts the sites.
    """
    decided = data.get("kind") != "scores"
    blocks = [_cost(row) for row in _check_rows(data, "blocks", ("dense", "pruned"))]
    sites = check_sites(data.get("sites")) if data.get("sites") or not blocks else []
    kept, heads = sum(sum(site["kept"]) for site in sites), sum(gone_before(site).count(False) for site in sites)
    ratio = 1 - kept / max(heads, 1)
    _check_counts(data, kept, heads, ratio)
    known = [score for site in sites for score in site["scores"] if score is not None]
    bounds = (min(known), max(known)) if known else None
    rows = head_map(sites, bounds, decided)
    units = _units(data, kept, heads)
    cost = [_cost(row) for row in _check_rows(data, "cost", ("dense", "pruned"))]
    quality = [_quality(row) for row in _check_rows(data, "quality", ("dense", "pruned"))]
    times = _check_rows(data, "times", ("seconds",))
    return {
        "kind": "pruning",
        "title": data.get("title"),
        "name": " ".join(str(x) for x in (data.get("model"), data.get("scorer") and f"by {data['scorer']}") if x),
        "headline": _headline(units, ratio) if decided else f"Scores of {kept:,} heads",
        "decided": decided,
        "facts": _facts(data),
        "scorer": data.get("scorer"),
        "tiles": _tiles((kept, heads) if sites else None, [*_key_costs(cost, units), *quality]) if decided else [],
        "loading": _loading(data),
        "rows": rows,
        "looks": {(cell["look"], cell["verdict"]) for row in rows for cell in row["cells"]},
        "columns": max((len(site["kept"]) for site in sites), default=0),
        "blocks": blocks,
        "bounds": bounds and [signed(f"{bound:.3g}") for bound in bounds],
        "histogram": bounds and histogram(sites, bounds[0], bounds[1]),
        "maps": _maps(data.get("attention_maps")),
        "maps_note": data.get("maps_note"),
        "refinement": _refinement(_check_type(data, "refinement", list, "be a list of numbers")),
        "cost": cost,
        "quality": quality,
        "times": [{"name": row["name"], "value": amount(row["seconds"], "s")} for row in times],
        "proof": _proof(data.get("proof")),
        "command": data.get("command"),
        "environment": _check_type(data, "environment", dict, "map names to values"),
        "notes": _check_type(data, "notes", list, "be a list of texts"),
    }


def _units(data: dict[str, Any], kept: int, heads: int) -> dict[str, tuple[int, int]]:
    """Return how many units of each kind there were, and how many stay; of heads as the sites say."""
    found = _check_type(data, "units", dict, "map kinds of units to their numbers before and after")
    for kind, counts in found.items():
        if not isinstance(counts, list | tuple) or len(counts) != 2 or not all(map(is_number, counts)):
            raise invalid(f"units[{kind!r}]", "be two numbers, before and after", counts)
    return found or ({"heads": (heads, kept)} if heads else {})


def _headline(units: dict[str, tuple[int, int]], ratio: float) -> str:
    words = "Kept " + ", ".join(f"{after:,} of {before:,} {kind}" for kind, (before, after) in units.items())
    return f"{words} (pruning ratio {ratio:.2f})" if set(units) == {"heads"} else words


def _key_costs(cost: list[dict[str, Any]], units: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the cost table that have a tile: the first two, or units and work where more than heads go.

    And latency, where it was measured.
    """
    if set(units) <= {"heads"}:
        return [*cost[:2], *(row for row in cost[2:] if row["name"].startswith("latency"))]
    return [row for row in cost if row["name"] != "parameters"]


def _loading(data: dict[str, Any]) -> dict[str, Any]:
    """Return what `how_to_load` found, empty where there is no model beside the report."""
    found: dict[str, Any] = _check_type(data, "loading", dict, "be what `how_to_load` returns, or be left out")
    if found and not (isinstance(found.get("code"), str) and isinstance(found.get("needs_secateur"), bool)):
        raise invalid("loading", "be what `how_to_load` returns, or be left out", found)
    return found


def _check_counts(data: dict[str, Any], kept: int, heads: int, ratio: float) -> None:
    """Refuse numbers that contradict the sites."""
    for name, counted, tolerance in (("kept", kept, 0), ("heads", heads, 0), ("pruning_ratio", ratio, 0.005)):
        said = data.get(name)
        if said is not None and (not is_number(said) or abs(said - counted) > tolerance):
            raise invalid(name, f"be {round(counted, 3)} as the sites say, or be left out", said)
    if data.get("requested_ratio") is not None and not is_number(data["requested_ratio"]):
        raise invalid("requested_ratio", "be a number", data["requested_ratio"])


def _facts(data: dict[str, Any]) -> list[tuple[str, Any]]:
    requested = data.get("requested_ratio")
    facts = [(name.capitalize(), data.get(name)) for name in ("model", "scorer", "allocation", "budget")]
    facts += [("Requested ratio", None if requested is None else f"{requested:.2f}"), ("Created", data.get("created"))]
    return [(name, value) for name, value in facts if value]


def _tiles(heads: tuple[int, int] | None, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the key figures: heads kept and before, where there are any, then a tile for each row."""
    tiles = [] if heads is None else [{"name": "attention heads", "value": f"{heads[0]:,}", "note": f"of {heads[1]:,}"}]
    for row in rows:
        measured = f", {row['note']}" if row["note"] else ""
        note = f"from {row['brief_dense']} ({row['change']}){measured}"
        tiles.append({"name": row["name"], "value": row["brief"], "note": note})
    return tiles


def _check_type(data: dict[str, Any], name: str, kind: type, rule: str) -> Any:
    """Return an optional section, empty where it is absent."""
    value = data.get(name)
    if value is not None and not isinstance(value, kind):
        raise invalid(name, rule, value)
    return kind() if value is None else value


def _check_rows(data: dict[str, Any], section: str, numbers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of an optional table after a check of their names and numbers; a number may be null."""
    rows = _check_type(data, section, list, "be a list of rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise invalid(f"{section}[{index}]", "be a mapping with a name", row)
        for key in numbers:
            if key not in row or not (row[key] is None or is_number(row[key])):
                raise invalid(f"{section}[{index}].{key}", "be a finite number or null", row.get(key))
    return list(rows)


def _cost(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the cost table in words, with the ratio and a short form for its tile."""
    dense, pruned, unit = row["dense"], row["pruned"], str(row.get("unit") or "")
    ratio = pruned / dense if dense and pruned is not None else None
    return {
        "name": row["name"],
        "note": row.get("note"),
        "dense": amount(dense, unit, dense),
        "pruned": amount(pruned, unit, dense),
        "ratio": DASH if ratio is None else f"{ratio:.3f}",
        "bar": None if ratio is None else f"{100 * min(max(ratio, 0.0), 1.0):.1f}",
        "change": DASH if ratio is None else change(100 * (ratio - 1), ".1f") + " %",
        "brief": brief(pruned, unit, dense),
        "brief_dense": brief(dense, unit, dense),
    }


def _quality(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the quality table in words; the change is a difference, for a metric's ratio says little."""
    dense, pruned = row["dense"], row["pruned"]
    both = [abs(x) for x in (dense, pruned) if x]
    form = ".2e" if both and max(both) < 0.001 else ".3f"
    shown = {key: DASH if row[key] is None else signed(f"{row[key]:{form}}") for key in ("dense", "pruned")}
    return {
        "name": row["name"],
        "note": row.get("note"),
        **shown,
        "change": DASH if dense is None or pruned is None else change(pruned - dense, form),
        "brief": shown["pruned"],
        "brief_dense": shown["dense"],
    }


def _proof(proof: object) -> dict[str, Any] | None:
    if proof is None:
        return None
    if not isinstance(proof, dict) or not all(is_number(proof.get(key)) for key in ("max_difference", "tolerance")):
        raise invalid("proof", "hold the numbers max_difference and tolerance", proof)
    return {
        "difference": f"{proof['max_difference']:.2g}".replace("e-0", "e-"),
        "tolerance": f"{proof['tolerance']:.2g}".replace("e-0", "e-"),
        "probe": proof.get("probe"),
        "holds": proof["max_difference"] <= proof["tolerance"],
    }


def _maps(maps: Any) -> dict[str, Any] | None:
    """Return the attention maps for the page's script, which decodes them, or None where there are none."""
    if maps is None:
        return None
    rule = "be what `AttentionMaps.to_json` returns"
    tokens = maps.get("tokens") if isinstance(maps, dict) else None
    if not isinstance(maps, dict) or not isinstance(maps.get("sites"), dict) or not isinstance(tokens, int):
        raise invalid("attention_maps", rule, maps)
    for site in maps["sites"].values():
        if not isinstance(site, dict) or not isinstance(site.get("heads"), list):
            raise invalid("attention_maps", rule, site)
        size = len(site["heads"]) * tokens**2
        levels, peaks = site.get("levels"), site.get("peaks")
        matching = isinstance(peaks, list) and len(peaks) == len(site["heads"]) and all(map(is_number, peaks))
        if not isinstance(levels, str) or len(levels) != 4 * -(-size // 3) or not matching:
            raise invalid("attention_maps", f"hold {shown(size)} levels and a peak for each head", levels)
    return {"tokens": maps["tokens"], "texts": maps.get("texts"), "sites": maps["sites"]} if maps["sites"] else None


def refinement_chart(tried: list[float]) -> Chart:
    """Return the curve of a refinement: the relational KL of every mask tried, and the lowest so far."""
    lowest, best = tried[0], []
    for number, value in enumerate(tried):
        lowest = min(lowest, value)
        best.append(Point(number, lowest, marked=False))
    points = [
        Point(number, value, note=f"mask {number}: {value:.4f}" if number else f"from the scores: {value:.4f}")
        for number, value in enumerate(tried)
    ]
    return Chart(
        slug="refinement",
        title="masks tried, in order",
        summary=f"Relational KL of {len(tried)} masks, from {tried[0]:.4f} for that of the scores down to {lowest:.4f}",
        x_label="exchange tried",
        y_label="relational KL",
        series=[
            Series("tried", 1, points, line=False, small=True),
            Series("best so far", 0, best, steps=True),
        ],
    )


def _refinement(tried: list[Any]) -> dict[str, Any] | None:
    if len(tried) < 2:
        return None
    if not all(is_number(value) for value in tried):
        raise invalid("refinement", "be a list of numbers", tried)
    first, best = tried[0], min(tried)
    return {
        "chart": drawn(refinement_chart(tried)),
        "first": f"{first:.4f}",
        "best": f"{best:.4f}",
        "change": change(100 * (best / first - 1), ".1f") + " %" if first else DASH,
        "tried": len(tried) - 1,
        "better": sum(value < min(tried[:n]) for n, value in enumerate(tried) if n),
    }
