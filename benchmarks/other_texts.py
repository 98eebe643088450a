"""The joint meta-pruner beside the contribution on dev texts that nothing about it was decided by.

    python benchmarks/other_texts.py --glue GLUE --fits DIR [--jobs N]

As representations.py, but heads are scored on four other draws of training texts, 96 as there and as many as `prune`
draws unless told, and masks judged on up to 256 of the dev texts that are not judged there and in joint_ablation.py, by
which the way to teach it was chosen. DIR holds a fit without each task (`joint_pruner.py unseen`). Prints 1000 times
the relational KL, and in how many draws it is lower than the contribution's, and writes results/other_texts.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from provenance import provenance
from representations import JUDGED, LENGTH, RATIOS, SCORED, TASKS
from secateur.choosing.mask_loss import MaskLoss
from secateur.comparing.workers import each, workers
from secateur.demo import CALIBRATION_TEXTS, demo_model
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers.score import score_heads
from secateur.support.files import write_text
from secateur.texts.data import Task, batches, load_task
from secateur.units.select import select_heads

COUNTS = (SCORED, CALIBRATION_TEXTS)
DRAWS = (2, 3, 4, 5)  # 0 and 1 are those of representations.py
OTHERS = 256  # dev texts that judge, at most
SCORERS = ("contribution", "smp-plus")


def other_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dev: Task) -> MaskLoss:
    """Return the judge of masks: up to 256 of the dev texts that representations.py does not judge by."""
    known, shuffled = (dev.head(count, seed=0).texts for count in (JUDGED, len(dev)))
    others = [text for text in shuffled if text not in known][:OTHERS]
    return MaskLoss(model, forward_arguments(model, batches(tokenizer, others, 32, LENGTH)), dev.is_pair)


def judge_task(glue: Path, fits: Path, task: str) -> list[dict[str, Any]]:
    """Return a row for the mask of each scorer, scope and ratio, chosen on as many of the texts of each draw."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    loss = other_loss(model, tokenizer, load_task(glue / task, "dev"))
    judged = sum(len(batch["input_ids"]) for batch in loss.batches)
    train = load_task(glue / task, "train")
    rows, known = [], {}  # draws often choose the same
    for seed, count, scorer in itertools.product(DRAWS, COUNTS, SCORERS):
        texts = train.head(count, seed=seed).texts
        extra = {"pruner": str(fits / task)} if scorer == "smp-plus" else {}
        scores = score_heads(model, texts, scorer, tokenizer, max_length=LENGTH, seed=seed, progress=False, **extra)
        for scope, ratio in itertools.product(("site", "global"), RATIOS):
            mask = select_heads(scores, ratio, scope)
            name = json.dumps(mask.to_json())
            if name not in known:
                known[name] = loss(mask)
            cell = {
                "task": task, "scorer": scorer, "scored": count, "scope": scope, "ratio": ratio, "seed": seed
            }  # fmt: skip
            rows.append({**cell, "judged": judged, "kl": known[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    calls = [(options.glue, options.fits, task) for task in TASKS]
    with workers(options.jobs, 1, "cpu") as pool:
        rows = [row for found in each(pool, judge_task, calls, "judging", True) for row in found]
    rows.sort(key=lambda row: (TASKS.index(row["task"]), row["seed"]))
    result = {
        **provenance("python benchmarks/other_texts.py --glue GLUE --fits DIR"),
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "other_texts.json", json.dumps(result, indent=1) + "\n")
    print(
        "| texts | heads removed | scope | scorer | " + " | ".join(TASKS) + " |",
        "|---" * (4 + len(TASKS)) + "|",
        sep="\n",
    )
    kl = {(r["scored"], r["task"], r["ratio"], r["scope"], r["scorer"], r["seed"]): 1e3 * r["kl"] for r in rows}
    for count, ratio, scope in itertools.product(COUNTS, RATIOS, ("site", "global")):
        found = {
            (s, t): [kl[count, t, ratio, scope, s, draw] for draw in DRAWS]
            for s, t in itertools.product(SCORERS, TASKS)
        }
        lines = {
            scorer: [
                f"{statistics.mean(found[scorer, t]):.1f} ± {statistics.stdev(found[scorer, t]):.1f}" for t in TASKS
            ]
            for scorer in SCORERS
        }
        plain, learned = SCORERS
        lines["lower in draws"] = [
            str(sum(a < b for a, b in zip(found[learned, t], found[plain, t], strict=True))) for t in TASKS
        ]
        for name, cells in lines.items():
            print(f"| {count} | {ratio:.0%} | {scope} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
