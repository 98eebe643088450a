"""What attention maps can say of tasks that a meta-pruner has not seen, and of those that it has.

    python -m benchmarks.run smp_unseen --data GLUE

The recipe of the pruner that ships, on all-MiniLM-L6-v2: 300 updates of 16 texts, from 8 batches a task. It is fitted
on seven tasks and judged on the eighth ("unseen"), on all eight ("all"), and on the judged task alone ("own"), which is
a bound for what its maps can say. Two signals rank a layer's heads: leave-one-out, and random masks. Estimates of a
batch are made once for all fits. Judged as in `representations`: heads are scored on training texts, half of every
layer's go, and the relational KL is measured on dev texts. Recovery is 0 for random heads and 1 for leave-one-out,
which `representations` has measured on the same texts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from accelerate import Accelerator
from benchmarks.provenance import made
from benchmarks.runs import JUDGED, LENGTH, RESULTS, Run, inputs, minilm, table
from torch import nn

from secateur.choosing.mask_loss import MaskLoss
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.subjects import Subject
from secateur.pruners.map_network import MetaPruner
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.support.files import read_json
from secateur.units.select import select

FITTED = ("unseen", "all", "own")


def measure(run: Run, *, signals: list[str], steps: int, draws: int, ratio: float) -> None:
    """Add a row for each signal, seed, task and what was fitted on, that there is none of."""
    model, tokenizer = minilm()
    sites, tasks = find_sites(model), [run.task(name) for name in run.tasks]
    subject = Subject(model, tokenizer)
    done = {(row["signal"], row["seed"], row["task"], row["fitted"]) for row in run.rows()}
    for signal in signals:
        for seed in run.seeds:
            config = MetaTrainingConfig(
                steps=steps, batch_size=16, batches_per_step=1, max_length=LENGTH, signal=signal, pool=8,
                optimizer="adam", learning_rate=1e-3, seed=seed,
            )  # fmt: skip
            shared: dict[str, Any] = {}
            fits: dict[str, tuple[MetaPruner, float]] = {}
            for number, name in enumerate(run.tasks):
                dev = run.task(name, "dev")
                judge = MaskLoss(model, inputs(model, tokenizer, dev.head(JUDGED, seed=0).texts), dev.is_pair)
                for fitted in FITTED:
                    if (signal, seed, name, fitted) in done:
                        continue
                    key = fitted if fitted == "all" else f"{fitted} {name}"
                    if key not in fits:
                        on = [(fitted == "all") or (fitted == "own") == (i == number) for i in range(len(tasks))]
                        fits[key] = fit(MetaTraining([subject], tasks, config, Accelerator(cpu=True)), on, shared)
                    pruner, seconds = fits[key]
                    kls = []
                    for draw in range(draws):
                        reading = Reading(max_length=LENGTH, seed=draw, progress=False)
                        scores = score(
                            model, run.texts(name, seed=draw), "smp", tokenizer, pruner=pruner, reading=reading
                        )
                        kls.append(judge(select(scores, ratio).present(sites)))
                    row = {"signal": signal, "seed": seed, "task": name, "fitted": fitted, "kl": kls}
                    run.add(
                        {**row, "recovery": recovery(name, ratio, kls), "processor_seconds": seconds, **made(run.note)}
                    )
    print(summary(run.rows()))


def fit(training: MetaTraining, on: list[bool], shared: dict[str, Any]) -> tuple[MetaPruner, float]:
    """Return a pruner that learned on some of the tasks, and the processor seconds that it took.

    What the batches of the pool show, and what their heads are worth, is made by whoever draws them first.
    """
    start = time.process_time()
    for name in ("_estimates", "_seen"):
        setattr(training, name, shared.setdefault(name, getattr(training, name)))
    training.weights = training.weights * torch.tensor(on)
    for step in range(training.config.steps):
        training.gradients(step)
        nn.utils.clip_grad_norm_(training.pruner.parameters(), training.config.clip)
        training.optimizer.step()
    return training.pruner.eval(), round(time.process_time() - start)


def recovery(task: str, ratio: float, kls: list[float]) -> float:
    """Return (random - found) / (random - leave-one-out) of the mean KL."""
    rows = read_json(RESULTS / "representations.json")["rows"]
    chance, best = (
        statistics.mean(
            row["kl"] for row in rows
            if (row["task"], row["scorer"], row["allocation"], row["ratio"]) == (task, scorer, "uniform", ratio)
        )
        for scorer in ("random", "leave_one_out")
    )  # fmt: skip
    return round((chance - statistics.mean(kls)) / (chance - best), 3)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the recovery by signal and by what was fitted on, means over seeds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for signal, fitted in dict.fromkeys((row["signal"], row["fitted"]) for row in rows):
        found = [
            [r["recovery"] for r in rows if (r["signal"], r["fitted"], r["task"]) == (signal, fitted, task)]
            for task in tasks
        ]
        cells = [statistics.mean(values) if values else float("nan") for values in found]
        lines.append([signal, fitted, *(f"{cell:.2f}" for cell in cells), f"{statistics.mean(cells):.2f}"])
    return table(["signal", "fitted on", *tasks, "mean"], sorted(lines))
