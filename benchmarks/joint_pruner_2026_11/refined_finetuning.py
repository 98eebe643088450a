"""What refining a mask for the relational KL does to what fine-tuning makes of it.

    OMP_NUM_THREADS=1 python benchmarks/refined_finetuning.py --glue GLUE --fits unseen [--seeds 0 1] [--jobs 2]

Half of all-MiniLM-L6-v2's heads, ranked over the whole model by smp-plus (fitted without the task: `joint_pruner.py
unseen`), then 40 exchanges on the 96 scored texts; both masks fine-tuned as in results/rivals.jsonl, whose dense rows
they are held against. GLUE is a folder with one folder a task. Rows are kept in results/refined_finetuning.jsonl: start
again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from finetuning_runs import LITE, SCORED, finetune_mask, score_texts
from joint_finetuning import RESULTS, TASKS
from secateur.compare import DENSE
from secateur.data import load_task
from secateur.demo import demo_model
from secateur.files import append_line, read_lines
from secateur.model.loading import load_model, load_tokenizer
from secateur.refinement import refine_mask
from secateur.selection import select_heads
from secateur.workers import each, workers

ROWS = RESULTS / "refined_finetuning.jsonl"
RATIO, STEPS = 0.5, 40


def measure(glue: Path, fits: Path, task: str, seed: int) -> dict[str, Any]:
    """Fine-tune with the mask as it was scored, and as it was refined."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    texts = load_task(glue / task, "train").head(SCORED, seed=seed).texts
    scores = score_texts(model, tokenizer, texts, "smp-plus", seed, pruner=str(fits / task))
    scored = select_heads(scores, RATIO, "global")
    refined, losses = refine_mask(
        model, scored, texts, tokenizer, steps=STEPS, scope="global", max_length=LITE.max_length, seed=seed
    )
    found = {
        name: finetune_mask(glue, task, seed, mask.kept_heads)
        for name, mask in (("scored", scored), ("refined", refined))
    }
    return {"task": task, "seed": seed, "losses": losses, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    done = {(row["task"], row["seed"]) for row in read_lines(ROWS)}
    cells = [(seed, task) for seed, task in itertools.product(options.seeds, TASKS) if (task, seed) not in done]
    with workers(options.jobs, 1, "cpu") as pool:
        calls = [(options.glue, options.fits, task, seed) for seed, task in cells]
        for row in each(pool, measure, calls, "tasks", True):
            append_line(ROWS, row)
    dense = {
        (row["task"], row["seed"]): row["value"]
        for row in read_lines(RESULTS / "rivals.jsonl")
        if row["scorer"] == DENSE
    }
    rows = read_lines(ROWS)
    for name in ("scored", "refined"):
        kept = [row[name]["value"] / dense[row["task"], row["seed"]] for row in rows]
        by_task = {
            task: [f"{row[name]['value']:.3f}" for row in sorted(rows, key=lambda r: r["seed"]) if row["task"] == task]
            for task in TASKS
        }
        print(f"{name}: {statistics.mean(kept):.1%} of dense in {len(kept)} runs, {by_task}")


if __name__ == "__main__":
    main()
