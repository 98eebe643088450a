"""From the folders and files that the commands write to the data of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.comparing.folder import check_row
from secateur.comparing.plan import COMMON
from secateur.errors import InvalidInputError, invalid
from secateur.models.sentence_transformers import transformer_folder
from secateur.report.how_to_load import how_to_load
from secateur.report.relational_kl import distillation_line, distillation_note, reconstruction_note
from secateur.support.checks import is_number
from secateur.support.files import read_json, read_lines
from secateur.support.parsing import short
from secateur.support.run_files import (
    ATTENTION_MAPS,
    DISTILLATION,
    PRUNED,
    PRUNING,
    RESULT,
    ROWS,
    SCORES,
    SETTINGS,
)
from secateur.units.grid import short_labels
from secateur.units.scores import Scores


def read_runs(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return data of each run, in order; comparisons that differ in tasks, scorers, ratios or seeds alone are joined.

    A path is a pruned folder, a scores file, a comparison's folder or its rows alone (`.jsonl`), or a demo's folder.
    Raises `InvalidInputError` for anything else and for files of another form.
    """
    if not paths:
        raise invalid("runs", "name at least one run", list(paths))
    found: list[dict[str, Any]] = []
    for path in paths:
        run = _read(Path(path))
        known = next((other for other in found if run["kind"] == "comparison" and _joins(other, run)), None)
        if known is None:
            found.append(run)
        else:
            known["rows"] += [row for row in run["rows"] if _cell(row) not in {_cell(r) for r in known["rows"]}]
            known["scores"] = {**run["scores"], **known["scores"]}
    return found


def pruning_data(report: Any, maps: Any = None, loading: Any = None) -> dict[str, Any]:
    """Return the data of a page for what `PruningReport.to_json` returned; `loading` is what `how_to_load` did.

    Raises `InvalidInputError` for data of another form.
    """
    with _form_of(PRUNING):
        return _pruning(report, maps, loading)


def _pruning(report: Any, maps: Any, loading: Any = None) -> dict[str, Any]:
    before, after, texts = report["before"], report["after"], report["num_texts"]
    sites = [
        {
            "name": name,
            "scores": scores,
            "kept": [head in kept for head in range(len(scores))],
        }
        for name, scores in report["scores"].items()
        for kept in [set(report["kept_heads"][name])]
    ]
    return {
        "kind": "pruning",
        "title": "secateur prune",
        "model": report["model"],
        "created": report.get("created"),
        "scorer": report["scorer"],
        "allocation": report["allocation"],
        "requested_ratio": report["requested_ratio"],
        "budget": _budget(report.get("budget")),
        "sites": sites,
        "units": report.get("units"),
        "blocks": _blocks(report.get("blocks", {})),
        "quality": _quality(report.get("quality")),
        "cost": [row for row in cost_rows(before, after, report.get("units")) if row["name"] != "heads"]
        + _latency(report.get("budget")),
        "times": [{"name": "scoring", "seconds": report["scoring_seconds"]}],
        "proof": {
            "max_difference": report["max_difference"],
            "tolerance": report["tolerance"],
            "probe": "the first texts" if texts else "random tokens",
        },
        "refinement": report.get("refinement"),
        "attention_maps": maps,
        "loading": loading,
        "maps_note": maps.get("reason") if isinstance(maps, dict) else "No attention maps were stored.",
        "command": report.get("command"),
        "environment": report.get("versions"),
        "notes": _reconstruction(report.get("reconstruction")) + _learned(report) + _left_out(report),
    }


@contextmanager
def _form_of(file: str) -> Iterator[None]:
    """Refuse a file whose data has another form than is read meanwhile."""
    try:
        yield
    except InvalidInputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InvalidInputError(f"{file} has another form: {type(error).__name__} {short(error)}") from None


def _reconstruction(relational_kl: Any) -> list[str]:
    """Say what refitting the output projections did, where it was asked for."""
    if not relational_kl:
        return []
    if not isinstance(relational_kl, list) or len(relational_kl) != 2 or not all(map(is_number, relational_kl)):
        raise invalid("reconstruction", "hold two numbers, without it and with it", relational_kl)
    before, after = relational_kl
    return [reconstruction_note(before, after)]


def _learned(report: Mapping[str, Any]) -> list[str]:
    """Say what the smaller model learned from the dense one within the pruning."""
    if not report.get("distillation"):
        return []
    before, after = report["distillation"]
    return [distillation_line(before, after, report["steps"]).capitalize() + "."]


def _left_out(report: Mapping[str, Any]) -> list[str]:
    """Say which steps were not taken."""
    lines = report.get("left_out", [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise invalid("left_out", "be a list of lines", lines)
    return [f"{line[:1].upper()}{line[1:]}." for line in lines]


def _blocks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each block of neurons and each list of layers, by short names where these tell them apart."""
    names = list(found)
    rows = zip(short_labels(names), found.values(), strict=True) if len(names) > 1 else found.items()
    return [{"name": f"{label}: {row['kind']}", "dense": row["of"], "pruned": row["kept"]} for label, row in rows]


def _quality(found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return rows that say what is left of the model without labels."""
    if not found:
        return []
    note = f"{found['num_texts']} texts held out"
    answers = {"name": "answers as the dense model", "dense": 1.0, "pruned": found.get("agreement"), "note": note}
    return [
        *([] if answers["pruned"] is None else [answers]),
        {"name": "mean cosine to the dense model", "dense": 1.0, "pruned": found["cosine"], "note": note},
        {"name": "relational KL", "dense": 0.0, "pruned": found["relational_kl"], "note": note},
    ]


def _asked(outcome: Any) -> str:
    return f"asked {outcome['asked']}" + ("" if outcome.get("is_measured", True) else ", by the table")


def _latency(outcomes: Any) -> list[dict[str, Any]]:
    """Return a row for each budget of latency: the share that was measured in the pruned model."""
    return [
        {"name": "latency, share", "dense": 1.0, "pruned": one["reached"], "note": _asked(one)}
        for one in _outcomes(outcomes)
        if one["asked"].startswith("latency")
    ]


def _distillation(about: Any) -> list[str]:
    """Say what the pruned model learned from the dense one, as `secateur distill` wrote it down."""
    with _form_of(DISTILLATION):
        before, after = about["relational_kl"]
        return [distillation_note(before, after, about["steps"], about["texts"])]


def cost_rows(
    before: dict[str, int], after: dict[str, int], units: Mapping[str, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """Return units, parameters and multiply-accumulates as rows.

    `before` and `after` are `ModelCost.to_json`'s, `units` the counts of a pruning report by kind.
    """
    counts = {"heads": (before["heads"], after["heads"])} | dict(units or {})
    rows = [{"name": kind, "dense": dense, "pruned": pruned} for kind, (dense, pruned) in counts.items()]
    rows.append({"name": "parameters", "dense": before["parameters"], "pruned": after["parameters"]})
    note = f"{before['batch']} x {before['length']} tokens"
    return [*rows, {"name": "multiply-accumulates", "dense": before["macs"], "pruned": after["macs"], "note": note}]


def demo_data(result: Any, maps: Any = None) -> dict[str, Any]:
    """Return the data of a page for the demo's result."""
    with _form_of(RESULT):
        data = _pruning(result["pruning"], maps)
        rows = {row["name"]: row for row in result["rows"]}
        data["cost"] += [rows["latency, 8 x 128"], rows["fine-tuning"]]
        data["quality"] = [{**rows["accuracy"], "note": f"held-out sentences, one seed ({result['seed']})"}]
        data["times"] += [{"name": name, "seconds": value} for name, value in result["step_seconds"].items()]
        title = {"title": "secateur demo", "model": result["model"], "command": result.get("command")}
    notes = [
        "Fine-tuned on the same sentences, in the same order, with the same seed.",
        "One seed on a small set: a difference of a point is noise.",
    ]
    return {**data, **title, "notes": notes}


def _read(path: Path) -> dict[str, Any]:
    if (path / ROWS).is_file():
        settings = read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}
        return _comparison(path.resolve().name, read_lines(path / ROWS), settings, path / SCORES)
    if path.suffix == ".jsonl" and path.is_file():
        return _comparison(path.stem, read_lines(path), {}, None)
    if (path / RESULT).is_file():
        return demo_data(read_json(path / RESULT), _maps_of(path / PRUNED))
    if (path / PRUNING).is_file():
        page = pruning_data(read_json(path / PRUNING), _maps_of(path), how_to_load(path))
        page["notes"] += _distillation(read_json(path / DISTILLATION)) if (path / DISTILLATION).is_file() else []
        return page
    data = read_json(path) if path.is_file() else None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "pruning_report":
        return pruning_data(data, _maps_of(path.parent), how_to_load(path.parent))
    if kind == "scores":
        return _scores(data)
    raise _no_run(path)


def _no_run(path: Path) -> InvalidInputError:
    if (transformer_folder(path) / "config.json").is_file():  # `save_pretrained` writes the model alone
        remedy = f'in Python `secateur.prune(…, out=folder)`, or with its report: report.save(folder / "{PRUNING}")'
        rule = f"hold {PRUNING} beside the model"
        return invalid("run", rule, str(path), f"`secateur prune` writes it, and {remedy}")
    rule = "be a pruned folder, a scores file, a comparison's folder or a demo's folder"
    return invalid("run", rule, str(path), "" if path.exists() else "there is no such file or folder")


def _budget(outcomes: Any) -> str | None:
    """Say what was asked for and reached, of every budget there was."""
    return "; ".join(f"{one['asked']}, reached {one['reached']:.3f}" for one in _outcomes(outcomes)) or None


def _outcomes(outcomes: Any) -> list[Any]:
    return outcomes if isinstance(outcomes, list) else [outcomes] if outcomes else []


def _maps_of(folder: Path) -> Any:
    return read_json(folder / ATTENTION_MAPS) if (folder / ATTENTION_MAPS).is_file() else None


def _scores(data: Any) -> dict[str, Any]:
    scores = Scores.from_json(data)
    found = scores.to_json()["scores"]
    rows = {name: row for name, row in found.items() if scores.kinds[name] != "neurons"}
    if not rows:
        raise invalid("run", "hold scores of heads or layers", "neurons", "`secateur score` prints those of neurons")
    sites = [{"name": name, "scores": row, "kept": [x is not None for x in row]} for name, row in rows.items()]
    return {"kind": "scores", "title": "secateur score", "scorer": data.get("scorer"), "sites": sites}


def _comparison(name: str, rows: list[Any], settings: Any, folder: Path | None) -> dict[str, Any]:
    for number, row in enumerate(rows, 1):
        check_row(row, f"{name}: row {number} of {ROWS}")
    if not isinstance(settings, dict):
        raise invalid("settings", "map names to values", settings)
    scores = {}
    for file in sorted(folder.glob("*.json")) if folder is not None and folder.is_dir() else []:
        scores[file.stem] = Scores.from_json(read_json(file)).to_json()["scores"]
    if not rows:
        raise invalid("run", "have at least one finished run", name)
    return {"kind": "comparison", "name": name, "rows": rows, "settings": settings, "scores": scores}


def _joins(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two comparisons are parts of one: the same settings and model, and the same data behind a task's name."""
    if one["kind"] != "comparison" or not one["settings"] or not other["settings"]:
        return False
    before, content = one["settings"].get("content", {}), other["settings"].get("content", {})
    if any(before.get(name, value) != value for name, value in content.items()):
        return False
    data = {row["task"]: row["data"] for row in one["rows"]}
    return all(_setting(one, name) == _setting(other, name) for name in COMMON) and all(
        data.get(row["task"], row["data"]) == row["data"] for row in other["rows"]
    )


def _setting(run: dict[str, Any], name: str) -> Any:
    return run["settings"].get(name) or None  # a folder from before a setting was known was made without it


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["scorer"], row["ratio"], row["seed"]
