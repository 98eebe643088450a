"""The folder of a comparison: its settings, scores and rows, for one process at a time and to go on with.

It holds `settings.json`, one file of scores for each scorer, task and seed in `scores/`, and one line for each finished
run in `runs.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from secateur.comparing.plan import CELLS, COMMON, Run, Settings
from secateur.comparing.splits import splits
from secateur.errors import InvalidInputError, invalid, shown
from secateur.models.model_content import fingerprint_of_files
from secateur.scorers import scorer_class
from secateur.support.checks import is_number
from secateur.support.files import LOCK, is_taken, one_run, read_json, read_lines, remove_unfinished, write_text
from secateur.support.run_files import ROWS, SCORES, SETTINGS, scores_stem


def _is_comparison(found: Any) -> bool:
    """Whether these may be the settings of a comparison, of which some may be of a later or an earlier version."""
    if not isinstance(found, dict) or not {"model", "data", "scorers"} <= set(found):
        return False
    lists = [found[name] for name in ("data", "scorers", "ratios") if name in found]
    mappings = [found[name] for name in ("pruners", "content") if name in found]
    return (
        all(isinstance(part, list) and {*map(type, part)} <= {str, int, float} for part in lists)
        and all(isinstance(part, dict) for part in mappings)
        and type(found.get("seeds", 1)) is int
    )


_SMALLEST, _LARGEST = 1e-100, 1e100
"""Of a number in a row but 0, its size: others have ratios, sums or squares that no float can have."""
_SIZES = f", 0 or from {_SMALLEST:g} to {_LARGEST:g} in size"


@contextmanager
def owned(out: Path, settings: Settings, content: Mapping[str, str]) -> Iterator[None]:
    """Hold the folder for this process alone, and check or write its settings and the fingerprints of `content_of`.

    A folder from before there were fingerprints counts as one of the same content, and gets them.
    """
    file = out / SETTINGS
    wanted = {**json.loads(json.dumps(asdict(settings))), "content": dict(content)}
    if is_taken(out) and not file.is_file():
        raise invalid("out", "be a new folder, or one with a comparison to go on with", str(out))
    if file.is_file():
        found = read_json(file)
        if not _is_comparison(found):
            raise invalid("out", "be a new folder, or one with a comparison to go on with", str(out))
        names = differences(found, wanted)
        if names:
            raise InvalidInputError(f"{out} holds a comparison with other {', '.join(names)}; choose another folder")
        before = found.get("content", {})
        changed = [name for name, value in content.items() if before.get(name, value) != value]
        if changed:
            raise InvalidInputError(
                f"{out} holds runs made before the content of {', '.join(changed)} changed; choose another folder with "
                "--out"
            )
    with one_run(out / LOCK, out):
        remove_unfinished(out)
        write_text(file, json.dumps(wanted, indent=1))
        yield


def content_of(settings: Settings, tasks: Mapping[str, str]) -> dict[str, str]:
    """Return fingerprints of what lies at the settings' places: the model, pruners, and `tasks` by name."""
    found = {f"model {settings.model}": fingerprint_of_files(settings.model)}
    for place in settings.pruners.values():
        for folder in dict.fromkeys(place.replace("{task}", task) for task in tasks):
            # A place that is no pruner fails where it is loaded, by the rules of its scorer.
            if (Path(folder) / "config.json").is_file():
                found[f"pruner {folder}"] = fingerprint_of_files(folder)
    return found | {f"task {name}": value for name, value in tasks.items()}


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the settings that forbid to go on; what only adds runs to those that are there may grow."""
    # A folder from before a setting was known has its default.
    found = {**{f.name: f.default for f in fields(Settings)}, "pruners": {}, **found}
    names = [name for name in CELLS if not _grows(found[name], wanted[name])]
    # A scorer that is added may bring its pruner.
    if any(found["pruners"].get(scorer) != wanted["pruners"].get(scorer) for scorer in found["scorers"]):
        names.append("pruners")
    return names + sorted(name for name in COMMON if name != "pruners" and found[name] != wanted[name])


def _grows(found: Any, wanted: Any) -> bool:
    """Whether a number, or a list of names, is in another."""
    return bool(found <= wanted if isinstance(found, int) else set(found) <= set(wanted))


def rows_by_run(out: Path) -> dict[Run, dict[str, Any]]:
    """Return the rows of the finished runs. Raises `InvalidInputError` for a row that is none."""
    rows = read_lines(out / ROWS)
    for number, row in enumerate(rows, 1):
        check_row(row, f"{out / ROWS}, line {number}")
    return {run_of(row): row for row in rows}


def run_of(row: Mapping[str, Any]) -> Run:
    """Return the run that a row is of."""
    return Run(row["data"], row["scorer"], row["ratio"], row["seed"])


def check_row(row: Any, where: str) -> None:
    """Raise `InvalidInputError` unless a row of a comparison holds what tables, the page and the plots are made of."""
    words, numbers = ("data", "task", "scorer", "metric"), ("ratio", "seed", "value")
    if missing := [key for key in (*words, *numbers, "cost") if not isinstance(row, dict) or key not in row]:
        raise InvalidInputError(f"{where} has no {', '.join(missing)}")
    for key in words:
        if not isinstance(row[key], str):
            raise InvalidInputError(f"{where}: `{key}` must be a text, got {shown(row[key])}")
    for key in numbers:
        if not _is_usual(row[key]):
            raise InvalidInputError(f"{where}: `{key}` must be a finite number{_SIZES}, got {shown(row[key])}")
    if not 0 <= row["ratio"] < 1:
        raise InvalidInputError(f"{where}: `ratio` must be in [0, 1), got {row['ratio']}")
    cost, kept, environment = row["cost"], row.get("kept_heads"), row.get("environment")
    if not isinstance(cost, dict) or not all(value is None or _is_usual(value) for value in cost.values()):
        raise InvalidInputError(f"{where}: `cost` must map names to numbers{_SIZES}, got {shown(cost)}")
    heads = [] if kept is None else kept.values() if isinstance(kept, dict) else [None]
    if not all(isinstance(row, list) and all(isinstance(head, int) for head in row) for row in heads):
        raise InvalidInputError(f"{where}: `kept_heads` must map sites to head numbers, got {shown(kept)}")
    if row.get("constant") is not None and not is_number(row["constant"]):
        raise InvalidInputError(f"{where}: `constant` must be a finite number, got {shown(row['constant'])}")
    if environment is not None and not isinstance(environment, dict):
        raise InvalidInputError(f"{where}: `environment` must map names to values, got {shown(environment)}")


def _is_usual(value: Any) -> bool:
    return is_number(value) and (value == 0 or _SMALLEST <= abs(value) <= _LARGEST)


def scores_file(out: Path, run: Run) -> Path:
    """Return where the scores of a run are: for all ratios, where the scorer allows it."""
    ratio = run.ratio if scorer_class(run.scorer).needs_ratio else None
    return out / SCORES / f"{scores_stem(splits(run.data)[0].name, run.scorer, run.seed, ratio)}.json"
