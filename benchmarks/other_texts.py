"""The joint meta-pruner beside the contribution on dev texts that nothing about it was decided by.

    python benchmarks/other_texts.py --glue GLUE --fits DIR

As representations.py, but heads are scored on other draws of training texts, and masks judged on the dev texts after
those that are judged there and in joint_ablation.py, by which the way to teach it was chosen. DIR holds a fit without
each task (`joint_pruner.py unseen`). Prints 1000 times the relational KL and writes results/other_texts.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from representations import JUDGED, LENGTH, RATIOS, SCORED, TASKS
from secateur.data import batches, load_task
from secateur.demo import demo_model
from secateur.files import write_text
from secateur.meta.search import MaskLoss
from secateur.model.inputs import forward_arguments
from secateur.model.loading import load_model, load_tokenizer
from secateur.scoring import score_heads
from secateur.selection import select_heads
from secateur.versions import environment

DRAWS = (2, 3)  # 0 and 1 are those of representations.py


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--fits", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    rows = []
    for task, seed in tqdm(list(itertools.product(TASKS, DRAWS))):
        dev = load_task(options.glue / task, "dev").head(2 * JUDGED, seed=0)
        made = forward_arguments(model, batches(tokenizer, dev.texts[JUDGED:], 32, LENGTH))
        loss = MaskLoss(model, made, dev.is_pair)
        texts = load_task(options.glue / task, "train").head(SCORED, seed=seed).texts
        for scorer, extra in (("contribution", {}), ("smp-plus", {"pruner": str(options.fits / task)})):
            scores = score_heads(model, texts, scorer, tokenizer, max_length=LENGTH, seed=seed, progress=False, **extra)
            for scope, ratio in itertools.product(("site", "global"), RATIOS):
                cell = {"task": task, "scorer": scorer, "scope": scope, "ratio": ratio, "seed": seed}
                rows.append({**cell, "judged": len(dev.texts) - JUDGED, "kl": loss(select_heads(scores, ratio, scope))})
    result = {
        "command": "python benchmarks/other_texts.py --glue GLUE --fits DIR",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 2 cores, no GPU",
        "versions": environment(),
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "other_texts.json", json.dumps(result, indent=1) + "\n")
    print("| heads removed | scope | scorer | " + " | ".join(TASKS) + " |", "|---" * (3 + len(TASKS)) + "|", sep="\n")
    for ratio, scope, scorer in itertools.product(RATIOS, ("site", "global"), ("contribution", "smp-plus")):
        cells = []
        for task in TASKS:
            found = [
                1e3 * r["kl"]
                for r in rows
                if (r["task"], r["ratio"], r["scope"], r["scorer"]) == (task, ratio, scope, scorer)
            ]
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}")
        print(f"| {ratio:.0%} | {scope} | {scorer} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
