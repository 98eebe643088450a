"""Which heads match words between two texts, and what fine-tuning makes of masks that lose them.

    OMP_NUM_THREADS=1 python benchmarks/matching_heads.py --glue GLUE

For each task of pairs (GLUE: a folder with one folder a task): the matching of every head of all-MiniLM-L6-v2 on 96
training texts, as the `matching` scorer counts it; and for each weight that the scorer could give it, in how many of
36 cells (six tasks, three ratios, two scopes) the heads above a matching of .2 all stay. Then every run of
results/rivals.jsonl on such a task, `matching`'s own left out, is put with those whose mask keeps as many of the
heads above a matching of .2; what they kept of the dense model's quality is shown for each number. Writes
results/matching_heads.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from provenance import provenance
from secateur.comparing.plan import DENSE
from secateur.demo import demo_model
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.pruners.evidence import gather_evidence
from secateur.scorers.score import score_heads
from secateur.sites.attention import find_sites
from secateur.support.files import read_lines, write_text
from secateur.texts.data import batches, load_task
from secateur.units.select import select_heads

RESULTS = Path(__file__).parent / "results"
PAIRS = ("stsb", "qqp", "mrpc", "mnli", "qnli", "rte")
TEXTS, LENGTH, MATCHES = 96, 64, 0.2


def matching_of(glue: Path, task: str) -> dict[str, Tensor]:
    """Return each site's matching, `[heads]`."""
    model, tokenizer = load_model(demo_model(), "cpu").eval(), load_tokenizer(demo_model())
    texts = load_task(glue / task, "train").head(TEXTS, seed=0).texts
    made = forward_arguments(model, batches(tokenizer, texts, 32, LENGTH))
    special = frozenset(tokenizer.all_special_ids)
    evidence = gather_evidence(model, find_sites(model), made, True, special_ids=special, maps=False)
    assert evidence.matching is not None  # asked for
    return evidence.split(evidence.matching)


def cells_that_keep(heads: dict[str, dict[str, list[float]]], glue: Path, weight: float) -> int:
    """Return in how many of task x ratio x scope the mask of `matching` with that weight keeps all heads that match."""
    model, tokenizer, kept = load_model(demo_model(), "cpu"), load_tokenizer(demo_model()), 0
    for task, rows in heads.items():
        texts = load_task(glue / task, "train").head(TEXTS, seed=0).texts
        scores = score_heads(model, texts, "matching", tokenizer, max_length=LENGTH, progress=False, weight=weight)
        for ratio, scope in itertools.product((0.25, 0.5, 0.75), ("site", "global")):
            mask = select_heads(scores, ratio, scope)
            kept += all(bool(mask[site][h]) for site, row in rows.items() for h, v in enumerate(row) if v > MATCHES)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    heads, groups = {}, defaultdict(list)
    for task in PAIRS:
        found = matching_of(options.glue, task)
        heads[task] = {site: row.tolist() for site, row in found.items()}
        top = sorted(
            ((float(v), n, h) for n, row in enumerate(found.values()) for h, v in enumerate(row)), reverse=True
        )
        print(task, "layer.head matching:", ", ".join(f"{n}.{h} {v:.2f}" for v, n, h in top[:5]))
    weights = {weight: cells_that_keep(heads, options.glue, weight) for weight in (0, 1, 2, 4, 8, 16)}
    print("weight, and cells of 36 that keep the heads that match:", weights)
    runs = read_lines(RESULTS / "rivals.jsonl")
    dense = {(run["task"], run["seed"]): run["value"] for run in runs if run["scorer"] == DENSE}
    for run in runs:
        if run["task"] in PAIRS and run["scorer"] not in (DENSE, "matching"):
            those = [(site, h) for site, row in heads[run["task"]].items() for h, v in enumerate(row) if v > MATCHES]
            kept = sum(h in run["kept_heads"][site] for site, h in those)
            groups[run["task"], run["ratio"], kept].append(run["value"] / dense[run["task"], run["seed"]])
    rows = [
        {"task": task, "ratio": ratio, "matching_heads_kept": kept, "retention": values}
        for (task, ratio, kept), values in sorted(groups.items())
    ]
    for row in rows:
        values = row["retention"]
        print(
            f"{row['task']} {row['ratio']:.0%}, {row['matching_heads_kept']} kept: {statistics.mean(values):.3f} "
            f"({min(values):.3f} to {max(values):.3f}), {len(values)} runs"
        )
    result = {
        **provenance("OMP_NUM_THREADS=1 python benchmarks/matching_heads.py --glue GLUE"),
        "texts": {"split": "train", "number": TEXTS, "tokens": LENGTH},
        "counts_as_matching_above": MATCHES,
        "heads": heads,
        "cells_of_36_that_keep_them_by_weight": weights,
        "runs": rows,
    }
    write_text(RESULTS / "matching_heads.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
