"""What long searches find on every task, and what they teach.

    python benchmarks/joint_pruner.py collect --glue GLUE --subjects minilm --samples benchmarks/results/deep_samples \\
        --pruner 'unseen/{unseen}' --search 100 --judges 3 --guides 1 --batch 256 --count 10 --singles 5 \\
        --device cuda --jobs 14
    python benchmarks/joint_pruner.py unseen --samples benchmarks/results/{joint,deep}_samples --out DIR
    python benchmarks/deep_search.py --glue GLUE --fits DIR [--jobs N]

The first command searches with 100 exchanges led by 256 training texts, from the choice of a fit without the task, for
each scope and ratio; it was ended after seven minutes, and read weights that were rounded to float16. Here the masks
that it found over the whole model are judged on the dev texts of other_texts.py, each search's and that of the heads
which most searches keep; and those of fits that they taught, without the task, with heads scored on the draws there,
of as many texts as `prune` takes unless told. What the contribution and smp-plus with the fits of other_texts.py, which
remember these masks, come to on the same texts is in results/other_texts.json. Prints 1000 times the relational KL and
writes results/deep_search.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from secateur.units.values import HeadMask, HeadScores

from other_texts import DRAWS, SCORERS, other_loss
from provenance import provenance
from representations import LENGTH, RATIOS, TASKS
from secateur.comparing.workers import each, workers
from secateur.demo import CALIBRATION_TEXTS, demo_model
from secateur.meta_training.sample import Sample
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers.score import score_heads
from secateur.support.files import read_json, write_text
from secateur.texts.data import load_task
from secateur.units.select import Scope, select_heads

RESULTS = Path(__file__).parent / "results"
SAMPLES = RESULTS / "deep_samples"
SCOPE: Scope = "global"
FOUND, AGREED, TAUGHT = "found by one search", "kept by most searches", "taught by deep searches"


def judge_task(glue: Path, fits: Path, task: str) -> list[dict[str, Any]]:
    """Return a row for each mask of a task: of each search, of all searches together, and of each draw's scores."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    loss, rows = other_loss(model, tokenizer, load_task(glue / task, "dev")), []
    samples = [Sample.load(path) for path in sorted(SAMPLES.glob(f"minilm-{task}-*"))]
    evidence = samples[0].evidence
    found = torch.stack([sample.found_by_ranking for sample in samples])  # [searches, ratios, heads]
    for number, ratio in enumerate(RATIOS):
        masks = [(FOUND, draw, HeadMask(evidence.split(mask))) for draw, mask in enumerate(found[:, number])]
        # Where as many searches keep two heads, the one that they keep at more ratios stays.
        votes = found[:, number].double().sum(dim=0) + found.double().sum(dim=(0, 1)) / 100
        masks.append((AGREED, 0, select_heads(HeadScores(evidence.split(votes)), ratio, SCOPE)))
        rows += [row(task, ratio, name, draw, loss(mask)) for name, draw, mask in masks]
    for draw in DRAWS:
        texts = load_task(glue / task, "train").head(CALIBRATION_TEXTS, seed=draw).texts
        scores = score_heads(
            model, texts, "smp-plus", tokenizer, max_length=LENGTH, seed=draw, progress=False, pruner=str(fits / task)
        )
        rows += [row(task, ratio, TAUGHT, draw, loss(select_heads(scores, ratio, SCOPE))) for ratio in RATIOS]
    return rows


def row(task: str, ratio: float, masks: str, draw: int, kl: float) -> dict[str, Any]:
    return {"task": task, "scope": SCOPE, "ratio": ratio, "masks": masks, "draw": draw, "kl": kl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    with workers(options.jobs, 1, "cpu") as pool:
        calls = [(options.glue, options.fits, task) for task in TASKS]
        rows = [row for found in each(pool, judge_task, calls, "judging", True) for row in found]
    rows.sort(key=lambda row: TASKS.index(row["task"]))
    result = {
        **provenance(
            "python benchmarks/deep_search.py --glue GLUE --fits DIR",
            "searches: one NVIDIA H200 and 14 processes, seven minutes",
        ),
        "rows": rows,
    }
    write_text(RESULTS / "deep_search.json", json.dumps(result, indent=1) + "\n")
    for other in read_json(RESULTS / "other_texts.json")["rows"]:
        if (other["scored"], other["scope"]) == (CALIBRATION_TEXTS, SCOPE):
            rows.append(row(other["task"], other["ratio"], other["scorer"], other["seed"], other["kl"]))
    print("| heads removed | masks | " + " | ".join(TASKS) + " |", "|---" * (2 + len(TASKS)) + "|", sep="\n")
    for ratio, masks in itertools.product(RATIOS, (*SCORERS, TAUGHT, FOUND, AGREED)):
        cells = []
        for task in TASKS:
            kl = [1e3 * r["kl"] for r in rows if (r["task"], r["ratio"], r["masks"]) == (task, ratio, masks)]
            cells.append(f"{statistics.mean(kl):.1f}" + (f" ± {statistics.stdev(kl):.1f}" if len(kl) > 1 else ""))
        print(f"| {ratio:.0%} | {masks} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
