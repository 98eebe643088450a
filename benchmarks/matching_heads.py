"""Which heads match words between two texts, and what fine-tuning makes of masks that lose them.

    OMP_NUM_THREADS=1 python benchmarks/matching_heads.py --glue GLUE

For each task of pairs (GLUE: a folder with one folder a task): the matching of every head of all-MiniLM-L6-v2 on 96
training texts, as the `matching` scorer counts it. Then every run of results/rivals.jsonl on such a task, `matching`'s
own left out, is put with those whose mask keeps as many of the heads above a matching of .2; what they kept of the
dense model's quality is shown for each number. Writes results/matching_heads.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from secateur.compare import DENSE
from secateur.data import batches, load_task
from secateur.demo import demo_model
from secateur.files import read_lines, write_text
from secateur.model.inputs import forward_arguments
from secateur.model.loading import load_model, load_tokenizer
from secateur.model.probe import HeadReading, probe
from secateur.scorers.matching import matching
from secateur.versions import environment

RESULTS = Path(__file__).parent / "results"
PAIRS = ("stsb", "qqp", "mrpc", "mnli", "qnli", "rte")
TEXTS, LENGTH, MATCHES = 96, 64, 0.2


@torch.no_grad()
def matching_of(glue: Path, task: str) -> dict[str, Tensor]:
    """Return each site's matching, `[heads]`."""
    model, tokenizer = load_model(demo_model(), "cpu").eval(), load_tokenizer(demo_model())
    texts = load_task(glue / task, "train").head(TEXTS, seed=0).texts
    sums: dict[str, Tensor] = {}
    special = frozenset(tokenizer.all_special_ids)
    for batch in forward_arguments(model, batches(tokenizer, texts, 32, LENGTH)):

        def keep(reading: HeadReading, batch: dict = batch) -> None:
            assert reading.weights is not None  # asked for below
            found = matching(reading.weights, batch, special).sum(dim=0)
            sums[reading.site] = sums.get(reading.site, torch.zeros(len(found))) + found

        with probe(model, keep, weights=True):
            model(**batch)
    return {site: total / TEXTS for site, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    heads, groups = {}, defaultdict(list)
    for task in PAIRS:
        found = matching_of(options.glue, task)
        heads[task] = {site: row.tolist() for site, row in found.items()}
        top = sorted(((float(v), n, h) for n, row in enumerate(found.values()) for h, v in enumerate(row)), reverse=True)
        print(task, "layer.head matching:", ", ".join(f"{n}.{h} {v:.2f}" for v, n, h in top[:5]))
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
        "command": "OMP_NUM_THREADS=1 python benchmarks/matching_heads.py --glue GLUE",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread of 2 cores, no GPU",
        "versions": environment(),
        "texts": {"split": "train", "number": TEXTS, "tokens": LENGTH},
        "counts_as_matching_above": MATCHES,
        "heads": heads,
        "runs": rows,
    }
    write_text(RESULTS / "matching_heads.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
