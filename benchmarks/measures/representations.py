"""The paper's comparison before fine-tuning: how well each scorer's mask keeps text representations.

For each task, heads are scored on training texts; the relational KL of the mask is measured on dev texts. Recovery =
(random - scorer) / (random - leave_one_out), both with allocation `uniform`, for either: 0 is random heads, 1 is
leave-one-out, with as many heads removed from every layer. Similarity is the Spearman correlation on STS-B's test pairs
of cosine similarities of mean-pooled embeddings, no fine-tuning, heads scored on STS-B's training pairs. Prints
Markdown tables and writes after every task; what the file has already is not measured again.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.embeddings import embeddings
from benchmarks.runs import JUDGED, LENGTH, SCORED, Run, inputs, minilm
from tqdm import tqdm

from secateur.choosing.mask_loss import MaskLoss
from secateur.choosing.refinement import refine_mask
from secateur.finetuning.evaluate import regression_metrics
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.texts.data import Task
from secateur.units.masks import Mask
from secateur.units.select import select


@dataclass(frozen=True)
class Method:
    """What is compared: a name in the tables, a registered scorer, and how many draws of texts.

    `pruner`: a folder, in which {fits} becomes that of the fits and {task} the task; `refine`: exchanges of heads that
    refinement tries; `ratios` and `allocations`: these alone.
    """

    name: str
    scorer: str
    draws: int
    pruner: str | None = None
    refine: int = 0
    ratios: tuple[float, ...] | None = None
    allocations: tuple[str, ...] | None = None

    def takes(self, allocation: str, ratio: float) -> bool:
        return (self.allocations is None or allocation in self.allocations) and (
            self.ratios is None or ratio in self.ratios
        )

    def options(self, run: Run, task: str) -> dict[str, str]:
        if self.pruner is None:
            return {}
        run.unseen(task)  # says what is missing
        return {"pruner": self.pruner.format(fits=run.fits, task=task)}


def similarity(model, tokenizer, task: Task, mask: Mask | None) -> float:
    """Return the Spearman correlation of cosine similarity with gold."""
    gates = {} if mask is None else {site: row.float() for site, row in mask.items()}
    with probe(model, gates=gates):
        first = embeddings(model, tokenizer, [a for a, _ in task.texts])
        second = embeddings(model, tokenizer, [b for _, b in task.texts])
    return regression_metrics(torch.cosine_similarity(first, second).tolist(), task.labels)["spearman"]


def measure(run: Run, *, methods: list[dict[str, Any]], allocations: list[str], ratios: list[float]) -> None:
    compared = [Method(**one) for one in methods]
    old = {"rows": [], "similarity": [], "scoring_seconds": {}} | run.so_far()
    rows, similarities = old["rows"], old["similarity"]
    times: dict[str, float] = {}
    done = {(row["task"], row["scorer"], row["seed"], row["allocation"], row["ratio"]) for row in rows}
    cells = list(itertools.product(allocations, ratios))
    model, tokenizer = minilm()
    sites = find_sites(model)
    test = run.task("stsb", "test", need_labels=True)
    if not similarities:
        found = similarity(model, tokenizer, test, None)
        similarities.append({"scorer": "dense", "allocation": "uniform", "ratio": 0.0, "seed": 0, "spearman": found})
    for name in run.tasks:
        train, dev = run.task(name), run.task(name, "dev")
        loss = MaskLoss(model, inputs(model, tokenizer, dev.head(JUDGED, seed=0).texts), dev.is_pair)
        wanted = [
            (m, seed, missing)
            for m in compared
            for seed in range(m.draws)
            if (missing := [cell for cell in cells if m.takes(*cell) and (name, m.name, seed, *cell) not in done])
        ]
        costs = defaultdict(list)
        for method, seed, missing in tqdm(wanted, desc=name):
            texts, options = train.head(SCORED, seed=seed).texts, method.options(run, name)
            start = time.perf_counter()
            scores = score(
                model, texts, method.scorer, tokenizer, reading=Reading(max_length=LENGTH, seed=seed), **options
            )
            costs[method.name].append(time.perf_counter() - start)
            for allocation, ratio in missing:
                mask = select(scores, ratio, allocation)
                if method.refine:
                    mask, _ = refine_mask(
                        model,
                        mask,
                        texts,
                        tokenizer,
                        steps=method.refine,
                        allocation=allocation,
                        reading=Reading(max_length=LENGTH, seed=seed),
                    )
                cell = {"scorer": method.name, "allocation": allocation, "ratio": ratio, "seed": seed}
                rows.append({"task": name, **cell, "kl": loss(mask.present(sites))})
                if name == "stsb":
                    similarities.append({**cell, "spearman": similarity(model, tokenizer, test, mask)})
        times.update({method: statistics.median(values) for method, values in costs.items()})
        result = {
            "model": "all-MiniLM-L6-v2",
            "texts": {"scored": SCORED, "judged": JUDGED, "tokens": LENGTH, "judged_split": "dev"},
            "scoring_seconds": {**times, **old["scoring_seconds"]},
            "rows": rows,
            "similarity": similarities,
        }
        run.write(**result)
    print(tables(result, ratios))


def tables(result: dict[str, Any], ratios: list[float]) -> str:
    """Return the result as Markdown."""
    kl = defaultdict(list)
    for row in result["rows"]:
        kl[row["ratio"], row["task"], row["allocation"], row["scorer"]].append(row["kl"])
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    every = [
        (allocation, name)
        for allocation in ("uniform", "ranking")
        for name in dict.fromkeys(r["scorer"] for r in result["rows"])
    ]
    lines = []
    for ratio in sorted({row["ratio"] for row in result["rows"]}):
        lines += ["", f"1000 times the relational KL (recovery), {ratio:.0%} of the heads removed", ""]
        lines += [
            "| allocation | scorer | " + " | ".join(tasks) + " | mean recovery |",
            "|---" * (len(tasks) + 3) + "|",
        ]
        for allocation, name in every:
            cells, recoveries = [], []
            if not all(kl[ratio, task, allocation, name] for task in tasks):
                continue  # measured on some tasks only
            for task in tasks:
                values = kl[ratio, task, allocation, name]
                chance, best = (statistics.mean(kl[ratio, task, "uniform", n]) for n in ("random", "leave_one_out"))
                recoveries.append((chance - statistics.mean(values)) / (chance - best))
                spread = f"±{1000 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{1000 * statistics.mean(values):.1f}{spread} ({recoveries[-1]:.2f})")
            lines.append(f"| {allocation} | {name} | " + " | ".join(cells) + f" | {statistics.mean(recoveries):.2f} |")
    if result["similarity"]:
        found = defaultdict(list)
        for row in result["similarity"]:
            found[row["allocation"], row["scorer"], row["ratio"]].append(row["spearman"])
        dense = found["uniform", "dense", 0.0][0]
        lines += ["", f"STS-B test, Spearman without fine-tuning; dense {dense:.4f}", ""]
        lines += [
            "| allocation | scorer | " + " | ".join(f"{r:.0%}" for r in ratios) + " |",
            "|---" * (len(ratios) + 2) + "|",
        ]
        for allocation, name in every:
            cells = []
            if not all(found[allocation, name, ratio] for ratio in ratios):
                continue
            for ratio in ratios:
                values = found[allocation, name, ratio]
                spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{spread} ({statistics.mean(values) / dense:.1%})")
            lines.append(f"| {allocation} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "| scorer | seconds to score 96 texts |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in result["scoring_seconds"].items()]
    return "\n".join(lines)
