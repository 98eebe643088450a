"""Does pruning adapt to the task? Masks made for one task are used on every other.

    python -m benchmarks.run adaptation --data GLUE

all-MiniLM-L6-v2, as many heads gone at every site. Heads are scored on training texts of one task. Its mask is judged
by the relational KL on dev texts of all tasks: with heads gated, before any fine-tuning. A pooled mask is made of the
mean of all tasks' scores, each divided by its own mean. Masks of another draw of the same task's texts say how much of
a difference is chance. Prints the matrix of each scorer: the KL of a mask divided by that of the task's own.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch
from benchmarks.provenance import made
from benchmarks.runs import JUDGED, LENGTH, Run, inputs, minilm, table

from secateur.choosing.mask_loss import MaskLoss
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.units.scores import Scores
from secateur.units.select import select

POOLED = "all tasks"


def measure(run: Run, *, scorers: list[str], ratio: float, texts: int) -> None:
    """Add the rows of every scorer, seed and pair of tasks that there are none of; `texts` of a task are scored."""
    model, tokenizer = minilm()
    sites = find_sites(model)
    judges = {
        name: MaskLoss(model, inputs(model, tokenizer, dev.head(JUDGED, seed=0).texts), dev.is_pair)
        for name in run.tasks
        for dev in [run.task(name, "dev")]
    }
    done = {(row["scorer"], row["seed"]) for row in run.rows()}
    for scorer in scorers:
        for seed in run.seeds:
            if (scorer, seed) in done:
                continue
            found: dict[str, Scores] = {}
            for name in run.tasks:
                reading = Reading(max_length=LENGTH, seed=seed, progress=False)
                found[name] = score(model, run.texts(name, texts, seed), scorer, tokenizer, reading=reading)
            masks = {name: select(scores, ratio) for name, scores in found.items()}
            masks[POOLED] = select(pooled(list(found.values())), ratio)
            rows = [
                {"scorer": scorer, "seed": seed, "made_for": of, "used_on": on, "kl": judge(mask.present(sites))}
                for of, mask in masks.items()
                for on, judge in judges.items()
            ]
            run.add({"scorer": scorer, "seed": seed, "ratio": ratio, "texts": texts, "rows": rows, **made(run.note)})
    print(matrices(run.rows()))


def pooled(found: list[Scores]) -> Scores:
    """Return the mean of several tasks' scores, each on its own scale."""
    sizes = [torch.cat(list(scores.values())).abs().mean() for scores in found]
    return Scores(
        {
            name: torch.stack([scores[name] / size for scores, size in zip(found, sizes, strict=True)]).mean(0)
            for name in found[0]
        }
    )


def matrices(results: list[dict[str, Any]]) -> str:
    """Return, for each scorer, the mean over seeds of each mask's KL as a multiple of the task's own mask's."""
    kls: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for result in results:
        for row in result["rows"]:
            kls[row["scorer"], row["made_for"], row["used_on"]].append(row["kl"])
    lines = []
    for scorer in dict.fromkeys(key[0] for key in kls):
        tasks = [on for one, of, on in kls if one == scorer and of == POOLED]
        rows: list[list[Any]] = []
        for of in [*tasks, POOLED]:
            ratios = [ratio_to_own(kls, scorer, of, on) for on in tasks]
            others = [value for value, on in zip(ratios, tasks, strict=True) if on != of]
            rows.append([of, *(f"{value:.2f}" for value in ratios), f"{statistics.mean(others):.2f}"])
        own = ["own, KL in thousandths", *(f"{1000 * statistics.mean(kls[scorer, on, on]):.1f}" for on in tasks), ""]
        lines += ["", f"## {scorer}", "", table(["made for ↓, used on →", *tasks, "mean of others"], [*rows, own])]
    return "\n".join(lines)


def ratio_to_own(kls: Any, scorer: str, of: str, on: str) -> float:
    """Return the mean KL of the masks made for one task on another, divided by that of the other's own masks."""
    return statistics.mean(kls[scorer, of, on]) / statistics.mean(kls[scorer, on, on])
