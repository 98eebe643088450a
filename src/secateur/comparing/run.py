"""One run of a comparison: score, prune, restore, fine-tune, and what that gave."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from secateur.comparing.folder import scores_file
from secateur.comparing.plan import DENSE, Run, Settings
from secateur.comparing.splits import splits
from secateur.errors import InvalidInputError, shown
from secateur.finetuning.evaluate import constant_metric, main_metric
from secateur.finetuning.finetune import finetune, load_classifier
from secateur.models.loading import load_model, load_tokenizer, quiet_transformers
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.score import score
from secateur.settings import Cut, Reading
from secateur.support.checks import is_number
from secateur.support.files import read_json, write_text
from secateur.support.versions import environment
from secateur.texts.tokenization import Text
from secateur.units.scores import Scores
from secateur.units.select import select


def score_run(settings: Settings, run: Run, out: Path, device: str) -> None:
    """Score, once for all ratios where the scorer allows it, and write the scores with what they cost."""
    train = splits(run.data)[0].head(settings.num_texts, seed=run.seed)
    options: dict[str, Any] = {}
    if run.scorer in settings.pruners:
        options["pruner"] = settings.pruners[run.scorer].replace("{task}", train.name)
    with quiet_transformers(False):
        model, tokenizer = load_model(settings.model, device), load_tokenizer(settings.model)
    start = time.perf_counter()
    scores = score(
        model, train.texts, run.scorer, tokenizer, labels=train.labels, cut=Cut(run.ratio),
        reading=_scoring(settings, run), **options,
    )  # fmt: skip
    cost = {"scoring_seconds": time.perf_counter() - start, "peak_memory": _peak_memory(device)}
    write_text(scores_file(out, run), json.dumps({**scores.to_json(), "cost": cost}, indent=1))


def read_scores(file: Path) -> tuple[Scores, dict[str, Any]]:
    """Return the scores that `score_run` wrote, and what they cost. Raises `InvalidInputError` for a damaged file."""
    found = read_json(file)
    scores, cost = Scores.from_json(found), found.get("cost")
    if not isinstance(cost, dict) or not all(value is None or is_number(value) for value in cost.values()):
        raise InvalidInputError(f"{file}: `cost` must map names to numbers, got {shown(cost)}; remove the file")
    return scores, cost


def train_run(settings: Settings, run: Run, out: Path, device: str) -> dict[str, Any]:
    """Prune where the run asks for it, fine-tune, and return the row."""
    protocol = settings.training
    train, dev = splits(run.data)
    train = train if protocol.max_train is None else train.head(protocol.max_train, seed=run.seed)
    # The head is drawn before anything else, so that dense and pruned start from the same one.
    set_seed(run.seed)
    with quiet_transformers(False):
        model, tokenizer = load_classifier(settings.model, train, dev), load_tokenizer(settings.model)
    training = _training(settings, run, device)
    pruned: dict[str, Any] = {"kept_heads": None, "cost": {}}
    if run.scorer != DENSE:
        pruned = _prune(model, tokenizer, settings, run, out, training)
    cost = pruned.pop("cost")
    _, result = finetune(
        model, train, dev, tokenizer=tokenizer, epochs=protocol.epochs, learning_rate=protocol.learning_rate,
        reading=training,
    )  # fmt: skip
    return {
        "data": run.data,
        "task": train.name,
        "scorer": run.scorer,
        "ratio": run.ratio,
        "seed": run.seed,
        "metric": main_metric(dev),
        "value": result.metrics[main_metric(dev)],
        "constant": constant_metric(dev),
        "metrics": result.metrics,
        "train_texts": len(train),
        "dev_texts": len(dev),
        "train_loss": result.train_loss,
        **pruned,
        "cost": {**cost, "training_seconds": result.seconds, "training_peak_memory": _peak_memory(device)},
        "environment": {**environment(), **_machine(device), "threads": settings.threads},
    }


def _prune(
    model: nn.Module, tokenizer: Any, settings: Settings, run: Run, out: Path, training: Reading
) -> dict[str, Any]:
    """Prune the model in place, and return what the row says of it: kept heads, what restoring them gave, and costs."""
    scores, cost = read_scores(scores_file(out, run))
    mask = select(scores, run.ratio, settings.allocation)
    row: dict[str, Any] = {"kept_heads": mask.kept}
    if settings.restore != "none":
        texts = splits(run.data)[0].head(settings.num_texts, seed=run.seed).texts
        start = time.perf_counter()
        relational_kl = reconstruct_(
            model.to(training.device), mask, texts, tokenizer, reading=_scoring(settings, run)
        )  # fmt: skip
        row["reconstruction"], cost["reconstruction_seconds"] = list(relational_kl), time.perf_counter() - start
    remove_(model, mask)
    if settings.restore == "distill":
        start = time.perf_counter()
        relational_kl = _distill(model, tokenizer, settings, splits(run.data)[0].texts, training)
        row["distillation"], cost["distillation_seconds"] = list(relational_kl), time.perf_counter() - start
    return {**row, "cost": cost}


def _distill(
    model: nn.Module, tokenizer: Any, settings: Settings, texts: list[Text], training: Reading
) -> tuple[float, float]:
    with quiet_transformers(False):
        teacher = load_model(settings.model, training.device)
    return distill_(model.to(training.device), teacher, texts, tokenizer, steps=settings.steps, reading=training)


def _scoring(settings: Settings, run: Run) -> Reading:
    """Return how calibration texts are read."""
    return Reading(max_length=settings.training.max_length, seed=run.seed)


def _training(settings: Settings, run: Run, device: str) -> Reading:
    """Return how training texts are read."""
    return replace(
        _scoring(settings, run), batch_size=settings.training.batch_size, bf16=settings.bf16, device=device
    )  # fmt: skip


def _peak_memory(device: str) -> int:
    """Return the most bytes that this process (on a GPU: its tensors) has held so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "python": platform.python_version()}
