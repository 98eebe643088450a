"""The paper's comparison before fine-tuning: how well each scorer's mask keeps text representations.

    python benchmarks/representations.py --glue GLUE [--seeds 3] [--pruner name=SCORER:FOLDER …] [--out FILE]

GLUE is a folder with one folder a task. For each task, heads are scored on training texts; the relational KL of the
mask is measured on dev texts. Recovery = (random - scorer) / (random - leave_one_out), both at scope `site`, for either
scope: 0 is random heads, 1 is leave-one-out, with as many heads removed from every layer. Similarity is the Spearman
correlation on STS-B's test pairs of cosine similarities of mean-pooled embeddings, no fine-tuning, heads scored on
STS-B's training pairs. Prints Markdown tables and writes raw JSON after every task; what the file has already is not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from secateur.units.values import HeadMask
from tqdm import tqdm

from embeddings import embeddings
from provenance import provenance
from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.refinement import refine_mask
from secateur.demo import demo_model
from secateur.finetuning.evaluate import regression_metrics
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers.score import score_heads
from secateur.sites.gating import probe
from secateur.support.files import read_json, write_text
from secateur.texts.data import Task, batches, load_task
from secateur.units.select import select_heads

TASKS = ["mnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte", "qnli"]
RATIOS = [0.25, 0.5, 0.75]
RANDOM_DRAWS = 5
SCORED, JUDGED, LENGTH = 96, 128, 64


@dataclass(frozen=True)
class Method:
    """What is compared: a name in the tables, a registered scorer, its pruner if any, and how many draws of texts."""

    name: str
    scorer: str
    draws: int
    pruner: str | None = None
    refine: int = 0


def methods(options: argparse.Namespace) -> list[Method]:
    """Return everything that is compared; a pruner's folder may hold {task}, which becomes the task's name."""
    seeds = options.seeds
    found = [
        Method("random", "random", max(RANDOM_DRAWS, seeds)),
        Method("contribution", "contribution", seeds),
        Method("matching", "matching", seeds),
        Method("smp", "smp", seeds),
        # These two are dear or need no texts: one draw.
        Method("leave_one_out", "leave_one_out", 1),
        Method("magnitude", "magnitude", 1),
    ]
    for text in options.pruner:
        name, _, rest = text.partition("=")
        scorer, _, folder = rest.partition(":")
        scorer, _, refine = scorer.partition("+")
        found.append(Method(name, scorer, seeds, folder or None, int(refine or 0)))
    return [m for m in found if not options.only or m.name in options.only]


def similarity(model, tokenizer, task: Task, mask: HeadMask | None) -> float:
    """Return the Spearman correlation of cosine similarity with gold."""
    gates = {} if mask is None else {site: row.float() for site, row in mask.items()}
    with probe(model, gates=gates):
        first = embeddings(model, tokenizer, [a for a, _ in task.texts])
        second = embeddings(model, tokenizer, [b for _, b in task.texts])
    return regression_metrics(torch.cosine_similarity(first, second).tolist(), task.labels)["spearman"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument(
        "--pruner", action="append", default=[], help="name=SCORER[+exchanges][:FOLDER], one more method"
    )
    parser.add_argument("--only", nargs="*", help="names of the methods to measure")
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--scopes", nargs="*", default=["site", "global"], choices=["site", "global"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "representations.json")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    old = read_json(options.out) if options.out.is_file() else {"rows": [], "similarity": [], "scoring_seconds": {}}
    rows, similarities = old["rows"], old["similarity"]
    times: dict[str, float] = {}
    done = {(row["task"], row["scorer"], row["seed"], row["scope"], row["ratio"]) for row in rows}
    cells = list(itertools.product(options.scopes, options.ratios))
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    test = load_task(options.glue / "stsb", "test", need_labels=True)
    if not similarities:
        found = similarity(model, tokenizer, test, None)
        similarities.append({"scorer": "dense", "scope": "site", "ratio": 0.0, "seed": 0, "spearman": found})
    for name in options.tasks:
        train, dev = load_task(options.glue / name, "train"), load_task(options.glue / name, "dev")
        loss = MaskLoss(
            model, forward_arguments(model, batches(tokenizer, dev.head(JUDGED, seed=0).texts, 32, LENGTH)), dev.is_pair
        )
        wanted = [
            (m, seed, missing)
            for m in methods(options)
            for seed in range(m.draws)
            if (missing := [cell for cell in cells if (name, m.name, seed, *cell) not in done])
        ]
        costs = defaultdict(list)
        for method, seed, missing in tqdm(wanted, desc=name):
            extra = {} if method.pruner is None else {"pruner": method.pruner.format(task=name)}
            texts = train.head(SCORED, seed=seed).texts
            start = time.perf_counter()
            scores = score_heads(model, texts, method.scorer, tokenizer, max_length=LENGTH, seed=seed, **extra)
            costs[method.name].append(time.perf_counter() - start)
            for scope, ratio in missing:
                mask = select_heads(scores, ratio, scope)
                if method.refine:
                    mask, _ = refine_mask(
                        model, mask, texts, tokenizer, steps=method.refine, scope=scope, max_length=LENGTH, seed=seed
                    )
                cell = {"scorer": method.name, "scope": scope, "ratio": ratio, "seed": seed}
                rows.append({"task": name, **cell, "kl": loss(mask)})
                if name == "stsb":
                    similarities.append({**cell, "spearman": similarity(model, tokenizer, test, mask)})
        times.update({method: statistics.median(values) for method, values in costs.items()})
        result = {
            **provenance("python benchmarks/representations.py --glue GLUE --seeds " + str(options.seeds)),
            "model": "all-MiniLM-L6-v2",
            "texts": {"scored": SCORED, "judged": JUDGED, "tokens": LENGTH, "judged_split": "dev"},
            "scoring_seconds": {**times, **old["scoring_seconds"]},
            "rows": rows,
            "similarity": similarities,
        }
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(tables(result))


def tables(result: dict) -> str:
    """Return the result as Markdown."""
    kl = defaultdict(list)
    for row in result["rows"]:
        kl[row["ratio"], row["task"], row["scope"], row["scorer"]].append(row["kl"])
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    every = [
        (scope, name) for scope in ("site", "global") for name in dict.fromkeys(r["scorer"] for r in result["rows"])
    ]
    lines = []
    for ratio in sorted({row["ratio"] for row in result["rows"]}):
        lines += ["", f"1000 times the relational KL (recovery), {ratio:.0%} of the heads removed", ""]
        lines += ["| scope | scorer | " + " | ".join(tasks) + " | mean recovery |", "|---" * (len(tasks) + 3) + "|"]
        for scope, name in every:
            cells, recoveries = [], []
            if not all(kl[ratio, task, scope, name] for task in tasks):
                continue  # measured on some tasks only
            for task in tasks:
                values = kl[ratio, task, scope, name]
                chance, best = (statistics.mean(kl[ratio, task, "site", n]) for n in ("random", "leave_one_out"))
                recoveries.append((chance - statistics.mean(values)) / (chance - best))
                spread = f"±{1000 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{1000 * statistics.mean(values):.1f}{spread} ({recoveries[-1]:.2f})")
            lines.append(f"| {scope} | {name} | " + " | ".join(cells) + f" | {statistics.mean(recoveries):.2f} |")
    if result["similarity"]:
        found = defaultdict(list)
        for row in result["similarity"]:
            found[row["scope"], row["scorer"], row["ratio"]].append(row["spearman"])
        dense = found["site", "dense", 0.0][0]
        lines += ["", f"STS-B test, Spearman without fine-tuning; dense {dense:.4f}", ""]
        lines += [
            "| scope | scorer | " + " | ".join(f"{r:.0%}" for r in RATIOS) + " |",
            "|---" * (len(RATIOS) + 2) + "|",
        ]
        for scope, name in every:
            cells = []
            if not all(found[scope, name, ratio] for ratio in RATIOS):
                continue
            for ratio in RATIOS:
                values = found[scope, name, ratio]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread} ({statistics.mean(values) / dense:.1%})")
            lines.append(f"| {scope} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "| scorer | seconds to score 96 texts |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in result["scoring_seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
