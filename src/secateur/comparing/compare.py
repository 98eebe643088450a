"""Scorers side by side: scorer x task x ratio x seed, each pruned before fine-tuning and measured after it.

A comparison is a folder: `settings.json`, one file of scores for each scorer, task and seed in `scores/`, and one line
for each finished run in `runs.jsonl`. It may be stopped at any moment and goes on where it stopped.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm
from transformers import set_seed

from secateur.comparing.workers import each, workers
from secateur.errors import InvalidInputError, invalid, shown
from secateur.finetuning.evaluate import main_metric
from secateur.finetuning.finetune import finetune, load_classifier
from secateur.finetuning.trainer import training_device
from secateur.models.loading import load_model, load_tokenizer, quiet_transformers
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers import SCORERS, scorer_class
from secateur.scorers.score import score
from secateur.settings import Cut, Reading, Restore
from secateur.support.checks import check_whole
from secateur.support.defaults import COMPARISON_TEXTS, DISTILLATION_STEPS
from secateur.support.files import (
    LOCK,
    append_line,
    is_taken,
    one_run,
    read_json,
    read_lines,
    remove_unfinished,
    write_text,
)
from secateur.support.versions import environment
from secateur.texts.data import Task, has_splits, load_task
from secateur.units.scores import Scores
from secateur.units.select import Allocation, select

DENSE = "dense"


@dataclass(frozen=True)
class Protocol:
    """How a run trains: the training texts at most (None: all), tokens a text, and the optimiser's settings."""

    max_train: int | None
    max_length: int
    epochs: float
    learning_rate: float
    batch_size: int = 32


PROTOCOLS = {
    "lite": Protocol(max_train=2000, max_length=64, epochs=3.0, learning_rate=5e-5),
    "full": Protocol(max_train=None, max_length=128, epochs=3.0, learning_rate=2e-5),
}
"""`lite` is for a laptop: about two minutes a run with MiniLM on two cores."""


@dataclass(frozen=True)
class Settings:
    """Everything that a comparison's numbers depend on.

    `data` names tasks as `load_task` takes them, each with train and dev. A run's seed draws its `num_texts`
    calibration texts from the training texts (with their labels, for scorers that need those), its training texts, the
    classification head and their order: dense and pruned runs of one seed are pairs. `threads` is the number of CPU
    threads of one run: another number rounds otherwise, so it belongs to the settings. `pruners` maps scorers to their
    meta-pruners, where those that ship are not meant; `{task}` in a place becomes the task's name, for a pruner of each
    task. `max_train` lowers the protocol's number of training texts; `learning_rate` and `epochs` take the place of the
    protocol's, for models that its own do not train to their best. `bf16` trains as `finetune` does with it.
    `restore` says what happens between pruning and fine-tuning: "reconstruct" refits the output projections of the kept
    heads on the calibration texts, as `reconstruct_` does; "distill" does so too, and then lets `distill_` teach the
    pruned model what the dense one computes, in `steps` updates on the texts of the whole train split, without labels.

    Raises `InvalidInputError` for values outside their ranges and for names that repeat.
    """

    model: str
    data: tuple[str, ...]
    scorers: tuple[str, ...]
    ratios: tuple[float, ...] = (0.5,)
    seeds: int = 3
    protocol: str = "lite"
    allocation: Allocation = "uniform"
    num_texts: int = COMPARISON_TEXTS
    threads: int = 1
    pruners: dict[str, str] = field(default_factory=dict)
    max_train: int | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    bf16: bool = False
    restore: Restore = "none"
    steps: int = DISTILLATION_STEPS

    def __post_init__(self) -> None:
        for name in ("data", "scorers", "ratios"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise invalid(name, "name at least one, each once", values)
        for scorer in self.scorers:
            if scorer not in SCORERS:
                raise invalid("scorers", f"be among {', '.join(sorted(SCORERS))}", scorer)
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise invalid("ratios", "lie between 0 and 1", ratio)
        for name in ("seeds", "num_texts", "threads", "max_train"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise invalid(name, "be at least 1", getattr(self, name))
        check_whole("steps", self.steps)
        if self.restore not in get_args(Restore):
            raise invalid("restore", f"be one of {', '.join(get_args(Restore))}", self.restore)
        for name in ("learning_rate", "epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise invalid(name, "be above 0", getattr(self, name))
        if self.protocol not in PROTOCOLS:
            raise invalid("protocol", f"be one of {', '.join(PROTOCOLS)}", self.protocol)
        for scorer in self.pruners:
            if scorer not in self.scorers or "pruner" not in inspect.signature(scorer_class(scorer)).parameters:
                raise invalid("pruners", "go with scorers of the comparison that take a meta-pruner", scorer)

    @property
    def training(self) -> Protocol:
        """How runs train: the protocol with what these settings put in its place."""
        protocol = PROTOCOLS[self.protocol]
        limits = [limit for limit in (protocol.max_train, self.max_train) if limit is not None]
        return replace(
            protocol,
            max_train=min(limits, default=None),
            learning_rate=self.learning_rate or protocol.learning_rate,
            epochs=self.epochs or protocol.epochs,
        )


@dataclass(frozen=True)
class Run:
    """One cell of a comparison; the dense model is the scorer `dense` at ratio 0."""

    data: str
    scorer: str
    ratio: float
    seed: int


def plan(settings: Settings) -> list[Run]:
    """Return every run, seed by seed, so that a comparison that is stopped early has whole seeds."""
    cells = [(DENSE, 0.0)] + [(scorer, ratio) for ratio in settings.ratios for scorer in settings.scorers]
    return [
        Run(data, scorer, ratio, seed)
        for seed in range(settings.seeds)
        for data in settings.data
        for scorer, ratio in cells
    ]


def compare(
    settings: Settings, out: str | Path, *, jobs: int = 1, device: str | None = None, progress: bool = True
) -> list[dict[str, Any]]:
    """Do every run that `out` does not have yet, and return all rows in the order of `plan`.

    `jobs` processes share the runs; with several GPUs each gets one. Rows do not depend on `jobs` or on the order,
    their `cost` aside.

    Raises `InvalidInputError` where `out` holds a comparison with other settings or is in use by another run, and
    whatever a run raises; finished runs stay.
    """
    if jobs < 1:
        raise invalid("jobs", "be at least 1", jobs)
    out = Path(out)
    place = str(training_device(device))
    _check_tasks(settings)
    with _owned(out, settings):
        table = out / "runs.jsonl"
        done = {_key(row): row for row in read_lines(table)}
        missing = [run for run in plan(settings) if run not in done]
        scorings = list(
            dict.fromkeys(
                run if scorer_class(run.scorer).needs_ratio else replace(run, ratio=0.0)
                for run in missing
                if run.scorer != DENSE and not _scores_file(out, run).is_file()
            )
        )
        scored = len(list((out / "scores").glob("*.json")))
        if progress and (done or scored):
            tqdm.write(
                f"going on: {scored} scorings, {len(done)} of {len(plan(settings))} runs are done", file=sys.stderr
            )
        with workers(jobs, settings.threads, place) as pool:
            for _ in each(pool, _score, [(settings, run, out, place) for run in scorings], "scoring", progress):
                pass
            calls = [(settings, run, out, place) for run in missing]
            for row in each(pool, _train, calls, "fine-tuning", progress):
                append_line(table, row)
                done[_key(row)] = row
    return [done[run] for run in plan(settings)]


def default_jobs(device: torch.device, threads: int) -> int:
    """Return how many runs this machine can do at once: one for each GPU, or as many as the cores have room for."""
    if device.type == "cuda":
        return torch.cuda.device_count() if device.index is None else 1
    return max(1, (os.cpu_count() or 1) // threads)


def _key(row: dict[str, Any]) -> Run:
    try:
        return Run(row["data"], row["scorer"], row["ratio"], row["seed"])
    except (KeyError, TypeError):
        raise InvalidInputError(f"runs.jsonl has a row that is no run: {shown(row)}") from None


@contextmanager
def _owned(out: Path, settings: Settings) -> Iterator[None]:
    """Hold the folder for this process alone, and check or write its settings."""
    file = out / "settings.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if is_taken(out) and not file.is_file():
        raise invalid("out", "be a new folder, or one with a comparison to go on with", str(out))
    if file.is_file():
        found = read_json(file)
        if not isinstance(found, dict) or not {"model", "data", "scorers"} <= set(found):
            raise invalid("out", "be a new folder, or one with a comparison to go on with", str(out))
        names = _differences(found, wanted)
        if names:
            raise InvalidInputError(f"{out} holds a comparison with other {', '.join(names)}; choose another folder")
    with one_run(out / LOCK, out):
        remove_unfinished(out)
        write_text(file, json.dumps(wanted, indent=1))
        yield


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the settings that forbid to go on; what only adds runs to those that are there may grow."""
    # A folder from before a setting was known has its default.
    found = {**{f.name: f.default for f in fields(Settings)}, "pruners": {}, **found}
    names = [name for name in ("data", "scorers", "ratios") if not set(found[name]) <= set(wanted[name])]
    if found["seeds"] > wanted["seeds"]:
        names.append("seeds")
    if any(found["pruners"].get(scorer) != wanted["pruners"].get(scorer) for scorer in found["scorers"]):
        names.append("pruners")
    fixed = set(wanted) - {"data", "scorers", "ratios", "seeds", "pruners"}
    return names + sorted(name for name in fixed if found[name] != wanted[name])


def _check_tasks(settings: Settings) -> None:
    """Read every split once before anything is computed; refuse two tasks of one name, and data without a dev split."""
    names: dict[str, str] = {}
    for data in settings.data:
        if not has_splits(data):
            raise invalid("data", "have train and dev apart", data, "give a folder with both, or a Hub id")
        train, _ = _splits(data)
        if train.name in names:
            raise InvalidInputError(f"{data} and {names[train.name]} have the same task name {train.name!r}")
        names[train.name] = data


@lru_cache(maxsize=2)
def _splits(data: str) -> tuple[Task, Task]:
    return load_task(data, "train", need_labels=True), load_task(data, "dev", need_labels=True)


def _scores_file(out: Path, run: Run) -> Path:
    name = _splits(run.data)[0].name.replace("/", "-")
    ratio = f"-{run.ratio:g}" if scorer_class(run.scorer).needs_ratio else ""
    return out / "scores" / f"{name}-{run.scorer}{ratio}-{run.seed}.json"


def _score(settings: Settings, run: Run, out: Path, device: str) -> None:
    """Score, once for all ratios where the scorer allows it, and write the scores with what they cost."""
    train = _splits(run.data)[0].head(settings.num_texts, seed=run.seed)
    options: dict[str, Any] = {}
    if run.scorer in settings.pruners:
        options["pruner"] = settings.pruners[run.scorer].replace("{task}", train.name)
    with quiet_transformers(False):
        model, tokenizer = load_model(settings.model, device), load_tokenizer(settings.model)
    start = time.perf_counter()
    scores = score(
        model,
        train.texts,
        run.scorer,
        tokenizer,
        labels=train.labels,
        cut=Cut(run.ratio),
        reading=Reading(max_length=settings.training.max_length, seed=run.seed),
        **options,
    )
    cost = {"scoring_seconds": time.perf_counter() - start, "peak_memory": _peak_memory(device)}
    write_text(_scores_file(out, run), json.dumps({**scores.to_json(), "cost": cost}, indent=1))


def _train(settings: Settings, run: Run, out: Path, device: str) -> dict[str, Any]:
    """Prune where the run asks for it, fine-tune, and return the row."""
    protocol = settings.training
    train, dev = _splits(run.data)
    train = train if protocol.max_train is None else train.head(protocol.max_train, seed=run.seed)
    # The head is drawn before anything else, so that dense and pruned start from the same one.
    set_seed(run.seed)
    with quiet_transformers(False):
        model, tokenizer = load_classifier(settings.model, train, dev), load_tokenizer(settings.model)
    reading = Reading(max_length=protocol.max_length, seed=run.seed)
    training = replace(reading, batch_size=protocol.batch_size, bf16=settings.bf16, device=device)
    cost: dict[str, Any] = {}
    kept, restored = None, {}
    if run.scorer != DENSE:
        data = read_json(_scores_file(out, run))
        mask = select(Scores.from_json(data), run.ratio, settings.allocation)
        kept, cost = mask.kept, dict(data["cost"])
        if settings.restore != "none":
            texts = _splits(run.data)[0].head(settings.num_texts, seed=run.seed).texts
            start = time.perf_counter()
            losses = reconstruct_(model.to(device), mask, texts, tokenizer, reading=reading)
            restored, cost["reconstruction_seconds"] = {"reconstruction": list(losses)}, time.perf_counter() - start
        remove_(model, mask)
        if settings.restore == "distill":
            start = time.perf_counter()
            with quiet_transformers(False):
                teacher = load_model(settings.model, device)
            losses = distill_(
                model.to(device),
                teacher,
                _splits(run.data)[0].texts,
                tokenizer,
                steps=settings.steps,
                reading=training,
            )
            restored["distillation"], cost["distillation_seconds"] = list(losses), time.perf_counter() - start
    _, result = finetune(
        model,
        train,
        dev,
        tokenizer=tokenizer,
        epochs=protocol.epochs,
        learning_rate=protocol.learning_rate,
        reading=training,
    )
    return {
        "data": run.data,
        "task": train.name,
        "scorer": run.scorer,
        "ratio": run.ratio,
        "seed": run.seed,
        "metric": main_metric(dev),
        "value": result.metrics[main_metric(dev)],
        "metrics": result.metrics,
        "train_texts": len(train),
        "dev_texts": len(dev),
        "train_loss": result.train_loss,
        "kept_heads": kept,
        **restored,
        "cost": {**cost, "training_seconds": result.seconds, "training_peak_memory": _peak_memory(device)},
        "environment": {**environment(), **_machine(device), "threads": settings.threads},
    }


def _peak_memory(device: str) -> int:
    """Return the most bytes that this process (on a GPU: its tensors) has held so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "python": platform.python_version()}
