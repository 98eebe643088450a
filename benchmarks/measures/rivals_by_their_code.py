"""Pruners of fine-tuned models by their own code beside ours, at equal multiply-accumulates.

    python3.11 -m venv WORK/env && WORK/env/bin/python -m pip install -r benchmarks/peers-rivals-requirements.txt
    python -m benchmarks.run rivals_by_their_code --data GLUE --work WORK

WORK holds clones of the rivals' repositories, named as on GitHub: WoosukKwon's `retraining-free-pruning` and
snudm-starlab's `K-prune`. Rows name their commits.

all-MiniLM-L6-v2 is fine-tuned on up to 6,000 training texts of a task, and pruned on 2,048 of these, the same for all:

- "kwon", Kwon et al. 2022, reads their labels; "k-prune", Park et al. 2024, does not. Both never train. Their `main.py`
  runs unchanged, evaluation included (rival_worker.py says with which shim), with its own settings: K-prune with those
  of its scripts/run.sh, but for the number of texts: it reads 100,000 tokens, which are 1,878 texts of MRPC.
  On STS-B its loss sets each prediction against all of its batch, as shapes broadcast; that is left as it is.
- "reconstructed" is `prune` without distillation, which never trains either. "distilled" is `prune` by its defaults.
- "distilled on all" reads all texts that the model was fine-tuned on, without labels.
- "before fine-tuning" prunes the encoder itself by the defaults, on all of these texts, and fine-tunes it then.

Multiply-accumulates are those of 128 tokens by our counter, of theirs too. Their own counters are told that length,
and their constraint is a ten-thousandth lower, since they leave out the pooler. Judged on the test split where it has
labels, on dev of QQP, by the metrics of both papers: accuracy, of STS-B the Spearman correlation. `labels` is how many
labels pruning itself reads; seconds are those of the pruning, without fine-tuning.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import made
from benchmarks.runs import ROOT, Run, minilm
from transformers import AutoModelForSequenceClassification

from secateur import Mask, find_units, prune, remove_
from secateur.demo import demo_model
from secateur.finetuning.evaluate import classification_metrics, evaluate_model, regression_metrics
from secateur.finetuning.finetune import finetune
from secateur.measuring.cost import measure_cost
from secateur.models.loading import load_model, load_tokenizer
from secateur.settings import Reading
from secateur.support.files import read_json, remove_folder
from secateur.support.run_files import FINETUNING
from secateur.texts.data import Task

MOST, CALIBRATION, LENGTH, MACS_LENGTH = 6_000, 2_048, 64, 128
EPOCHS, RATE, BATCH = 3, 5e-5, 32
UNCOUNTED = 1e-4  # of the multiply-accumulates: the pooler's
WORKER = ROOT / "benchmarks" / "rival_worker.py"


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    """Add a row for each way and share of multiply-accumulates, each task and seed, that there is none of."""
    done = {(row["task"], row["seed"], row["way"], row["budget"]) for row in run.rows()}
    for seed in run.seeds:
        subjects = {task: Subject(run, task, seed) for task in run.tasks}
        for way, limit in cells:
            for task, subject in subjects.items():
                if (task, seed, way, limit) in done:
                    continue
                try:
                    found = WAYS[way](subject, limit)
                except subprocess.CalledProcessError as error:  # the others go on; the next start tries it again
                    print(f"{task}, {way}, {limit}: {error}", flush=True)
                    continue
                metrics = found.pop("metrics")
                value, dense = metrics[subject.metric], subject.dense[subject.metric]
                run.add(
                    {
                        "task": task,
                        "budget": limit,
                        "way": way,
                        "seed": seed,
                        "metric": subject.metric,
                        "value": round(value, 4),
                        "dense": round(dense, 4),
                        "retention": round(value / dense, 4),
                        "metrics": {name: round(one, 4) for name, one in metrics.items()},
                        **found,
                        **made(run.note),
                    }
                )


@dataclass
class Subject:
    """A task with its texts, and the model that was fine-tuned on them."""

    run: Run
    name: str
    seed: int

    def __post_init__(self) -> None:
        run, name, seed = self.run, self.name, self.seed
        self.train = run.task(name, need_labels=True).head(MOST, seed=seed)
        self.calibration = self.train.head(CALIBRATION, seed=seed)
        self.judge = run.task(name, "dev" if name == "qqp" else "test", need_labels=True)
        self.metric = "spearman" if self.train.is_regression else "accuracy"
        self.reading = Reading(batch_size=BATCH, max_length=LENGTH, seed=seed)
        self.folder = run.work / f"{name}-{seed}"
        self.tokenizer = load_tokenizer(demo_model())

    @cached_property
    def dense(self) -> dict[str, float]:
        """The metrics of the fine-tuned model, which is made where there is none yet."""
        if not self.fine_tuned.is_dir():
            self.finetune(demo_model(), self.fine_tuned)
        return read_json(self.fine_tuned / FINETUNING)["metrics"]

    @property
    def fine_tuned(self) -> Path:
        return self.folder / "dense"

    def finetune(self, model: Path, out: Path) -> dict[str, float]:
        """Fine-tune a folder into another; return its metrics."""
        _, result = finetune(
            str(model), self.train, self.judge, out=out, epochs=EPOCHS, learning_rate=RATE, reading=self.reading
        )
        return result.metrics

    def classifier(self) -> Any:
        assert self.dense
        return load_model(self.fine_tuned, "cpu", AutoModelForSequenceClassification)

    def pruned(self, model: Any, limit: float, texts: Task, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Prune a model by `prune`; return it, and what a row says of that."""
        start, spent = time.perf_counter(), time.process_time()
        smaller, report = prune(
            model, texts.texts, budget=f"macs={limit}", tokenizer=self.tokenizer, reading=self.reading, **options
        )
        return smaller, {
            "macs": round(report.after.macs / report.before.macs, 4),
            "kept": {name: len(kept) for name, kept in report.mask.kept.items()},
            "texts": len(texts),
            "labels": 0,
            "seconds": round(time.perf_counter() - start),
            "processor_seconds": round(time.process_time() - spent),
        }


def of_classifier(subject: Subject, limit: float, texts: Task, **options: Any) -> dict[str, Any]:
    smaller, found = subject.pruned(subject.classifier(), limit, texts, **options)
    return found | {"metrics": evaluate_model(smaller, subject.tokenizer, subject.judge, reading=subject.reading)}


def of_encoder(subject: Subject, limit: float) -> dict[str, Any]:
    """Prune before fine-tuning, as far as an earlier run has not come."""
    smaller, said = subject.folder / f"pruned-{limit}", subject.folder / f"pruned-{limit}.json"
    if not said.is_file():
        remove_folder(smaller)
        _, found = subject.pruned(minilm()[0], limit, subject.train, out=smaller)
        said.write_text(json.dumps(found))
    tuned = subject.folder / f"pruned-{limit}-tuned"
    remove_folder(tuned)
    return read_json(said) | {"metrics": subject.finetune(smaller, tuned)}


def by_rival(subject: Subject, limit: float, name: str, clone: str, main: str, label: int) -> dict[str, Any]:
    """Run a rival's own code in its own environment."""
    model, clone, out = as_of_old(subject), subject.run.work / clone, subject.folder / f"{name}-{limit}"
    out.mkdir(parents=True, exist_ok=True)
    arguments, masks = ARGUMENTS[name](limit - UNCOUNTED, out)
    arguments |= {"model_name": demo_model(), "ckpt_dir": model, "task_name": subject.name, "seed": subject.seed}
    words = [word for option, value in arguments.items() for word in (f"--{option}", str(value)) if word]
    job = {
        "clone": str(clone), "main": main, "arguments": words, "task": subject.name, "length": LENGTH,
        "macs_length": MACS_LENGTH, "masks": [str(out / mask) for mask in masks], "out": str(out / "found.json"),
        "train": rows_of(subject.calibration), "test": rows_of(subject.judge),
    }  # fmt: skip
    (out / "job.json").write_text(json.dumps(job))
    (out / "found.json").unlink(missing_ok=True)
    with (out / "said.txt").open("w") as said:
        subprocess.run(
            [subject.run.work / "env" / "bin" / "python", WORKER, out / "job.json"], stdout=said, stderr=said,
            cwd=out, check=True, env={**os.environ, "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""},
        )  # fmt: skip
    found = read_json(out / "found.json")
    predictions, judge = found["predictions"], subject.judge
    metrics = regression_metrics if judge.is_regression else classification_metrics
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "metrics": metrics(predictions, judge.labels),
        **units_of(found["heads"], found["neurons"]),
        "texts": CALIBRATION,
        "labels": label * CALIBRATION,
        "seconds": found["seconds"],
        "processor_seconds": found["processor_seconds"],
        "rival": {"commit": commit.stdout.strip(), **found["versions"]},
    }


def rows_of(task: Task) -> list[list[Any]]:
    """Return the texts of each row and its label."""
    texts = task.texts if task.is_pair else [(text,) for text in task.texts]
    return [[*text, label] for text, label in zip(texts, task.labels or [], strict=True)]


def as_of_old(subject: Subject) -> Path:
    """Return a folder of the fine-tuned model that transformers 4.25 reads."""
    model, folder = subject.classifier(), subject.folder / "of-old"
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def units_of(heads: list[list[bool]], neurons: list[list[bool]]) -> dict[str, Any]:
    """Return the share of multiply-accumulates that masks leave by our counter, and how many units stay."""
    model, _ = minilm()
    before = measure_cost(model, length=MACS_LENGTH).macs
    sites = find_units(model, ("heads", "neurons"))
    mask = Mask(dict(zip(sites, map(torch.tensor, [*heads, *neurons]), strict=True)))
    remove_(model, mask)
    return {
        "macs": round(measure_cost(model, length=MACS_LENGTH).macs / before, 4),
        "kept": {site: len(kept) for site, kept in mask.kept.items()},
    }


def of_kwon(limit: float, out: Path) -> tuple[dict[str, Any], tuple[str, str]]:
    options = {"constraint": limit, "num_samples": CALIBRATION, "output_dir": out}
    return options, ("head_mask.pt", "neuron_mask.pt")


def of_kprune(limit: float, out: Path) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return its arguments: the constraint is what goes, and texts are counted by tokens."""
    options = {"constraint": 1 - limit, "num_tokens": CALIBRATION * MACS_LENGTH, "exp_name": out}
    options |= {"lam_pred": 1.0, "lam_rep": 2.5e-4, "T": 2, "mu": 64, "sublayerwise_tuning": ""}
    return options, ("head_masks.pkl", "neuron_masks.pkl")


ARGUMENTS = {"kwon": of_kwon, "k-prune": of_kprune}
WAYS = {
    "kwon": lambda s, limit: by_rival(s, limit, "kwon", "retraining-free-pruning", "main.py", 1),
    "k-prune": lambda s, limit: by_rival(s, limit, "k-prune", "K-prune", "src/main.py", 0),
    "reconstructed": lambda s, limit: of_classifier(s, limit, s.calibration, restore="reconstruct"),
    "distilled": lambda s, limit: of_classifier(s, limit, s.calibration),
    "distilled on all": lambda s, limit: of_classifier(s, limit, s.train),
    "before fine-tuning": of_encoder,
}
"""Each takes a subject and a share of the multiply-accumulates, and returns what its row says."""
