"""What the joint meta-pruner's evidence, its looking at all heads together, and its teachers are worth, fine-tuned.

    OMP_NUM_THREADS=1 python benchmarks/joint_finetuning.py --glue GLUE --work DIR [--jobs 2] [--ratios 0.5 …]

The variants of joint_ablation.py, fitted with its first seed without two tasks at a time, and what ships without
any sample of MiniLM too, score the texts of the tasks left out as the runs of results/rivals.jsonl did: the same 96
texts, the same share of every layer, the same fine-tuning, three seeds. A mask that has been fine-tuned already
with the same task and seed, there or here, is not trained again: the result is the same bit for bit, which
`--check` tries on one row. GLUE is a folder with one folder a task. Fits and rows are kept in --work: start again
to go on. Writes results/joint_finetuning.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finetuning_runs import SCORED, finetune_mask, key, score_texts
from joint_ablation import FOLDS, MODEL, PARTS, RESULTS, UNSEEN, WHOLE, fit_variant, parts_of
from secateur.compare import DENSE
from secateur.data import load_task
from secateur.demo import demo_model
from secateur.files import append_line, read_lines, write_text
from secateur.meta.joint import JointPruner
from secateur.model.loading import load_model, load_tokenizer
from secateur.selection import select_heads
from secateur.summary import ALL_TASKS, summarise
from secateur.workers import each, workers

TASKS = ("sst2", "stsb", "qqp", "mrpc")
SEEDS = (0, 1, 2)
FITTED = (
    "maps only",
    "sizes",
    "+ direction",
    "+ redundancy",
    WHOLE,
    "taught by trials",
    "taught by heads dropped alone",
)
HELD_OUT = f"{WHOLE}, MiniLM unseen"
VARIANTS = (*FITTED[:5], *PARTS[1:], *FITTED[5:], HELD_OUT)


def fit(variant: str, tasks: tuple[str, ...], fits: Path) -> None:
    """Fit without these tasks, or without the model; what is left of the whole without a part of it comes with it."""
    if variant == HELD_OUT:
        pruner = fit_variant(WHOLE, seed=0, families=(MODEL,))
    else:
        pruner = fit_variant(variant, seed=0, tasks=tasks)
    found = {variant: pruner}
    if variant == WHOLE:
        found |= dict(zip(PARTS[1:], parts_of(pruner)[1:], strict=True))
    for name, one in found.items():
        one.save_pretrained(place(fits, name, tasks))


def place(fits: Path, variant: str, tasks: tuple[str, ...]) -> Path:
    return fits / (UNSEEN if variant == HELD_OUT else "+".join(tasks)) / variant.replace(" ", "_")


@torch.no_grad()
def choose(glue: Path, fits: Path, ratios: list[float]) -> list[dict[str, Any]]:
    """Return a row for each mask that the variants choose."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    cells = [(t, tasks, v) for tasks in FOLDS for t in tasks if t in TASKS for v in VARIANTS]
    rows = []
    for task, tasks, variant in tqdm(cells, desc="scoring"):
        pruner = JointPruner.from_pretrained(place(fits, variant, tasks))
        for seed in SEEDS:
            texts = load_task(glue / task, "train").head(SCORED, seed=seed).texts
            scores = score_texts(model, tokenizer, texts, "smp-plus", seed, pruner=pruner)
            masks = {ratio: select_heads(scores, ratio).kept_heads for ratio in ratios}
            rows += [
                {"task": task, "scorer": variant, "ratio": ratio, "seed": seed, "kept_heads": kept}
                for ratio, kept in masks.items()
            ]
    return sorted(rows, key=lambda row: ratios.index(row["ratio"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.25], help="one after the other")
    parser.add_argument("--check", action="store_true", help="train a row of rivals.jsonl again, and stop")
    options = parser.parse_args()
    rivals = read_lines(RESULTS / "rivals.jsonl")
    if options.check:
        torch.set_num_threads(1)
        row = next(row for row in rivals if (row["scorer"], row["task"]) == ("smp-plus", "stsb"))
        again = finetune_mask(options.glue, row["task"], row["seed"], row["kept_heads"])
        print(f"{row['value']} there, {again['value']} here")
        return
    fits, runs = options.work / "fits", options.work / "runs.jsonl"
    folds = [tasks for tasks in FOLDS if set(tasks) & set(TASKS)]
    with workers(options.jobs, 1, "cpu") as pool:
        wanted = {place(fits, v, tasks): (v, tasks, fits) for tasks in folds for v in (*FITTED, HELD_OUT)}
        missing = [call for folder, call in wanted.items() if not folder.exists()]
        list(each(pool, fit, missing, "fits", True))
        rows = choose(options.glue, fits, options.ratios)
        here = {key(row): row for row in read_lines(runs)}
        there = {key(row): {"value": row["value"], "as_in": "rivals.jsonl"} for row in rivals if row["kept_heads"]}
        calls = {key(r): (options.glue, r["task"], r["seed"], r["kept_heads"]) for r in rows}
        calls = {k: call for k, call in calls.items() if k not in here and k not in there}
        for row in each(pool, finetune_mask, list(calls.values()), "fine-tuning", True):
            append_line(runs, row)
            here[key(row)] = row
    found = [{**row, **(there | here)[key(row)]} for row in rows]
    write_text(RESULTS / "joint_finetuning.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    print(table(found + [row for row in rivals if row["scorer"] in (DENSE, "contribution", "matching")]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return what is kept of the dense model's quality, mean over tasks and seeds, by task at half, as Markdown."""
    found = {(s.task, s.scorer, s.ratio): s for s in summarise(rows)}
    ratios = sorted({ratio for _, _, ratio in found} - {0.0})
    lines = ["| fitted with | " + " | ".join([*(f"{r:.0%}" for r in ratios), *(f"{t}, half" for t in TASKS)]) + " |"]
    lines.append("|---" * (1 + len(ratios) + len(TASKS)) + "|")
    for name in ("contribution", "matching", *VARIANTS):
        kept = [found.get((ALL_TASKS, name, ratio)) for ratio in ratios]
        half = [found[task, name, 0.5] for task in TASKS]
        cells = ["" if one is None or one.retention is None else f"{one.retention:.1%}" for one in kept]
        cells += [f"{one.mean:.3f} ± {one.std:.3f}" for one in half]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
