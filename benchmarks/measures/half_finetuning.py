"""Half of the model and a third of it, then fine-tuned on a task: what is left of the dense model's metric.

    python -m benchmarks.run half_finetuning --data GLUE

all-MiniLM-L6-v2 is pruned by `prune` alone on a task's training texts, without labels, and its folder is fine-tuned on
1,000 of them with labels, under several seeds. Ways: by need, which is the default; the same share at every site; whole
layers instead; heads alone, as far as they reach. All are reconstructed, where the way allows it, and distilled alike.
Judged on the test file where it has labels, else on the dev file, which nothing is chosen on; `chosen_on` is the same
metric on 500 other training texts, which choices may look at.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.measures.half_model import BY_NEED, SAME_SHARE, SCORED
from benchmarks.provenance import made
from benchmarks.runs import Run

from secateur.demo import demo_model
from secateur.finetuning.evaluate import evaluate_model, main_metric
from secateur.finetuning.finetune import finetune
from secateur.models.loading import load_tokenizer
from secateur.pruning import prune
from secateur.settings import Cut, Reading
from secateur.support.files import read_json, write_text
from secateur.texts.data import Task

LABELLED, HELD_OUT, JUDGED, LENGTH = 1_000, 500, 2_000, 64
EPOCHS, RATE = 3.0, 1e-4  # as in results/rivals.jsonl
TESTED = ("mrpc", "sst2", "stsb")  # tasks whose test file has labels

WAYS: dict[str, dict[str, Any]] = {
    "by need": {"cut": BY_NEED},
    "same share": {"cut": SAME_SHARE},
    "layers": {"cut": Cut(allocation="uniform", units=["layers"]), "scorer": "block_influence"},
    "heads": {"cut": Cut(units=["heads"])},
}
"""What is handed to `prune` beside the budget and distillation."""


def measure(run: Run, *, cells: list[list[str]], finetunings: int, steps: int) -> None:
    """Add a row for each task, way, budget, seed of the pruning and seed of the fine-tuning that there is none of."""
    done = {(row["task"], row["way"], row["budget"], row["seed"], row["finetuning_seed"]) for row in run.rows()}
    for seed in run.seeds:
        for way, budget in cells:
            for task in run.tasks:
                ask = [(task, way, budget, seed, seed * finetunings + number) for number in range(finetunings)]
                missing = [one for one in ask if one not in done]
                if not missing:
                    continue
                folder, about = pruned(run, task, way, budget, seed, steps)
                for key in missing:
                    names = ("task", "way", "budget", "seed", "finetuning_seed")
                    run.add(dict(zip(names, key, strict=True)) | about | taught(run, folder, task, key[-1]))
                if folder != demo_model():
                    shutil.rmtree(folder)


def pruned(run: Run, task: str, way: str, budget: str, seed: int, steps: int) -> tuple[str | Path, dict[str, Any]]:
    """Return the folder of the pruned encoder, made unless an earlier run made it, and facts about it."""
    if way == "dense":
        return demo_model(), {"macs": 1.0}
    folder = run.work / f"{task}-{way}-{budget}-{seed}".replace(" ", "-")
    facts = folder.with_suffix(folder.suffix + ".json")
    if not (folder.is_dir() and facts.is_file()):
        shutil.rmtree(folder, ignore_errors=True)
        run.work.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        _, report = prune(
            demo_model(), run.task(task).texts, budget=budget, restore="distill", steps=steps, out=folder,
            reading=Reading(seed=seed, stop=SCORED, progress=False), **WAYS[way],
        )  # fmt: skip
        about = {
            "macs": round(report.after.macs / report.before.macs, 4),
            "steps": steps,
            "quality": None if report.quality is None else report.quality.to_json(),
            "kept": {name: len(kept) for name, kept in report.mask.kept.items()},
            "pruning_processor_seconds": round(time.process_time() - start),
        }
        write_text(facts, json.dumps(about))
    return folder, read_json(facts)


def taught(run: Run, folder: str | Path, task: str, seed: int) -> dict[str, Any]:
    """Fine-tune a folder and return its metric on the texts that judge and on those that choices may look at."""
    every = run.task(task, need_labels=True).head(LABELLED + HELD_OUT, seed=seed)
    assert every.labels is not None
    train = Task(task, every.texts[:LABELLED], every.labels[:LABELLED])
    held = Task(task, every.texts[LABELLED:], every.labels[LABELLED:])
    judge = run.task(task, "test" if task in TESTED else "dev", need_labels=True)
    judge = judge if len(judge) <= JUDGED else judge.head(JUDGED, seed=0)
    reading = Reading(max_length=LENGTH, seed=seed, device="cpu", progress=False)
    model, result = finetune(
        folder, train, judge, epochs=EPOCHS, learning_rate=RATE, reading=reading, tokenizer=load_tokenizer(demo_model())
    )
    main = main_metric(judge)
    other = evaluate_model(model, load_tokenizer(demo_model()), held, reading=reading)[main]
    return {
        "metric": main,
        "value": round(result.metrics[main], 4),
        "chosen_on": round(other, 4),
        "finetuning_seconds": round(result.seconds),
    } | made(run.note)
