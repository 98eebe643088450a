"""What it brings to teach the joint pruner a model of a kind that it has not seen: `secateur joint-train`, measured.

    pip install --no-deps rxnfp sapiens==1.0.3
    OMP_NUM_THREADS=1 python benchmarks/teaching.py [--subjects rxnfp sapiens-heavy sapiens-light] [--seeds 3] \
        [--search 24] [--float32]

Each model, which no pruner has seen, teaches a new one by two samples of texts of its own domain, with three seeds, by
trials of masks or, with --search, by the masks that so many exchanges find, which the pruner remembers too. Then heads
are scored on 96 of those texts, and the masks are judged by their relational KL on 128 others (subjects.py), at three
ratios and both scopes, beside `contribution`, which `smp-plus` falls back on there, and, at scope site, random heads
and leave-one-out as measured by transfer.py. --float32: for a CPU that computes bfloat16 many times as slowly. Prints a
Markdown table and writes results/teaching.json after every subject; what the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import subjects
from provenance import machine, today
from secateur.choosing.mask_loss import MaskLoss
from secateur.meta_training.joint_config import JointTrainingConfig
from secateur.meta_training.joint_training import train_joint_pruner
from secateur.meta_training.subjects import Subject
from secateur.scorers.score import score_heads
from secateur.support.files import read_json, write_text
from secateur.support.versions import environment
from secateur.texts.data import Task
from secateur.units.select import select_heads

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "teaching.json"
RATIOS = (0.25, 0.5, 0.75)
SCOPES = ("uniform", "ranking")
SCORED, JUDGED = 96, 128
CONTRIBUTION = "contribution"
BY_TRIALS, BY_SEARCHES = "smp-plus, taught this model", "smp-plus, taught this model by searches"
TAUGHT = (BY_TRIALS, BY_SEARCHES)


def length(name: str) -> int:
    return subjects.ANTIBODY if name.startswith("sapiens") else subjects.LENGTH


def measure(name: str, seeds: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each scorer, seed, scope and ratio."""
    subject, rows = subjects.SUBJECTS[name](), []
    taught = BY_SEARCHES if settings["search"] else BY_TRIALS
    loss = MaskLoss(subject.model, subject.draw(JUDGED, 1), False)
    task = Task(name, list(subject.texts))
    for seed in range(seeds):
        config = JointTrainingConfig(max_length=length(name), seed=seed, **settings)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            pruner = train_joint_pruner(
                [Subject(subject.model, subject.tokenizer)], [task], Path(folder) / "run", config
            )
        seconds = time.perf_counter() - start
        inputs = subject.draw(SCORED, 2 * seed)
        for scorer, kind, options in ((CONTRIBUTION, CONTRIBUTION, {}), (taught, "smp-plus", {"pruner": pruner})):
            scores = score_heads(subject.model, None, kind, inputs=inputs, **options)
            for scope, ratio in itertools.product(SCOPES, RATIOS):
                row = {"subject": name, "scorer": scorer, "seed": seed, "scope": scope, "ratio": ratio}
                row["kl"] = loss(select_heads(scores, ratio, scope))
                about = {**settings, "date": today(), "machine": machine(), "teaching_seconds": seconds}
                rows.append({**row, **about} if scorer == taught else row)
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("subject", "scorer", "seed", "scope", "ratio"))


def table(rows: list[dict[str, Any]]) -> str:
    """Return 1000 times the relational KL, mean ± spread over seeds, as Markdown."""
    found = defaultdict(list)
    for row in rows:
        found[row["subject"], row["scope"], row["ratio"], row["scorer"]].append(1000 * row["kl"])
    for row in read_json(RESULTS / "transfer.json")["rows"]:
        if row["scorer"] in ("random", "leave_one_out"):
            found[row["subject"], "site", row["ratio"], row["scorer"]].append(1000 * row["kl"])
    names = ("random", "leave_one_out", CONTRIBUTION, *TAUGHT)
    lines = ["| model | scope | heads removed | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for subject, scope, ratio in itertools.product(dict.fromkeys(row["subject"] for row in rows), SCOPES, RATIOS):
        cells = []
        for name in names:
            values = found[subject, scope, ratio, name]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {subject} | {scope} | {ratio:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=["rxnfp", "sapiens-heavy", "sapiens-light"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", type=int, default=0)
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    settings = {"search": options.search, "bf16": not options.float32}
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    rows = read_json(OUT)["rows"] if OUT.is_file() else []
    taught = BY_SEARCHES if options.search else BY_TRIALS
    for name in options.subjects:
        if (name, taught) not in {(row["subject"], row["scorer"]) for row in rows}:
            found = measure(name, options.seeds, settings)
            there = {key(row) for row in rows}
            rows = rows + [row for row in found if key(row) not in there]
        taught_ones = dict.fromkeys(row["subject"] for row in rows)
        result = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/teaching.py",
            "versions": environment(),
            "config": {
                **{name: value for name, value in asdict(JointTrainingConfig()).items() if name not in settings},
                "max_length": {who: length(who) for who in taught_ones},
            },
            "rows": rows,
        }
        write_text(OUT, json.dumps(result, indent=1) + "\n")
    print(table(rows))
    for name, scorer in itertools.product(taught_ones, TAUGHT):
        seconds = [row["teaching_seconds"] for row in rows if (row["subject"], row["scorer"]) == (name, scorer)]
        if seconds:
            print(f"{name}, {scorer}: {statistics.median(seconds):.0f} s to teach")


if __name__ == "__main__":
    main()
