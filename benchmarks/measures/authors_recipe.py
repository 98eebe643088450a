"""The authors' recipe for scoring against ours: the same pruner, the same model, the same tasks, in one run.

The recipe, as in the authors' code (github thunlp/SMP): every training
text, padded to 128 tokens, the maps of all layers of a batch held at once and given to the network together. Ours:
`score(…, "smp", stop="auto")`, texts in random order, batches padded to their longest text, one site's maps at a
time. In each round the recipe scores one batch and ours scores until it stops, in turn, on one thread.

The recipe takes hours for all texts here, so its time is that of the batches it scored times how many there are. The
mask that it would give is that of our scoring of every text; on the batches that the recipe scored, both ways' scores
are compared (`largest_difference`), so that the one may stand for the other. Time is the process's CPU time, which
other work on the machine disturbs least; seconds of wall are beside it. What is done is kept in --work: start again to
go on.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import Run, alone, memory_mb, minilm
from torch import Tensor

import secateur
from secateur.demo import demo_model
from secateur.models.loading import load_model
from secateur.pruners.map_network import PAIR, SINGLE, MetaPruner
from secateur.scorers.smp import SHIPPED
from secateur.settings import Reading
from secateur.sites.gating import probe
from secateur.support.files import append_line, read_lines
from secateur.texts.data import Task, load_task
from secateur.units.scores import Scores

BATCH, LENGTH = 32, 128
PART = 1024


class Bench:
    """The model, twice: for the recipe with the attention that returns maps, for ours as it loads."""

    def __init__(self) -> None:
        self.model, self.tokenizer = minilm()
        self.eager = load_model(demo_model(), "cpu", attn_implementation="eager")
        self.pruner = MetaPruner.from_pretrained(str(SHIPPED)).eval()

    @torch.no_grad()
    def recipe(self, task: Task, rows: list[int]) -> tuple[dict[str, Tensor], int]:
        """Score one batch by the authors' recipe; return scores `[heads]` a layer, and the bytes of the maps held."""
        texts = [task.texts[i] for i in rows]
        first, second = ([t[0] for t in texts], [t[1] for t in texts]) if task.is_pair else (texts, None)
        batch = self.tokenizer(
            first, second, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        maps = self.eager(**batch, output_attentions=True).attentions
        held = sum(m.nbytes for m in maps)
        real = batch["attention_mask"][:, None, :, None].float()
        stacked = torch.cat([(m * real).flatten(0, 1) for m in maps])
        scores = self.pruner(stacked)[:, PAIR if task.is_pair else SINGLE].view(len(maps), len(rows), -1)
        names = [f"encoder.layer.{layer}.attention.self" for layer in range(len(maps))]
        return dict(zip(names, scores.double().mean(dim=1), strict=True)), held

    def ours(self, task: Task, rows: list[int] | None = None, **options: Any) -> Scores:
        """Score all texts of the task, or some of them."""
        texts = task.texts if rows is None else [task.texts[i] for i in rows]
        return secateur.score(
            self.model,
            texts,
            "smp",
            self.tokenizer,
            pruner=self.pruner,
            reading=Reading(batch_size=BATCH, max_length=LENGTH),
            **options,
        )

    def map_bytes(self, task: Task, rows: list[int]) -> int:
        """Return the bytes of the largest site's maps in one batch of ours."""
        largest = [0]
        batch = self.tokenizer(
            *([list(t) for t in zip(*(task.texts[i] for i in rows), strict=True)] if task.is_pair else
              [[task.texts[i] for i in rows]]),
            padding=True, truncation=True, max_length=LENGTH, return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad(), probe(self.model, lambda r: largest.append(r.weights.nbytes), weights=True):
            self.model(**batch)
        return max(largest)


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def agreement(one: Scores, other: Scores) -> float:
    """Return the share of heads with the same verdict at half of every site's heads."""
    masks = [secateur.select(scores) for scores in (one, other)]
    return float(torch.cat([masks[0][site] == masks[1][site] for site in one]).double().mean())


def score_all(bench: Bench, task: Task, work: Path) -> Scores:
    """Score every text in parts that are kept, and put the parts together."""
    file = work / f"{task.name}.jsonl"
    done = {row["start"]: row for row in read_lines(file)}
    for start in range(0, len(task), PART):
        if start not in done:
            rows = list(range(start, min(start + PART, len(task))))
            found = bench.ours(task, rows)
            done[start] = {"start": start, "count": len(rows), "scores": {s: v.tolist() for s, v in found.items()}}
            append_line(file, done[start])
            print(f"{task.name}: {start + len(rows)} of {len(task)} texts scored", flush=True)
    sites = next(iter(done.values()))["scores"]
    total = {
        site: sum(torch.tensor(r["scores"][site], dtype=torch.float64) * r["count"] for r in done.values())
        for site in sites
    }
    return Scores({site: value / len(task) for site, value in total.items()})


def peak(way: str, name: str, data: str) -> float:
    """Return how far one batch raises this process's peak memory above the loaded models, in MB."""
    bench, task = Bench(), load_task(Path(data) / name, "train")
    rows = random.Random(0).sample(range(len(task)), BATCH)
    bench.ours(task, rows[:1])
    before = memory_mb()
    bench.recipe(task, rows) if way == "recipe" else bench.ours(task, rows)
    return memory_mb() - before


def of_task(run: Run, bench: Bench, name: str, rounds: int) -> dict[str, Any]:
    task, file = run.task(name), run.work / f"{name}-rounds.jsonl"
    for number in range(len(read_lines(file)), rounds):
        rows = random.Random(number).sample(range(len(task)), BATCH)
        start = clocks()
        by_recipe, held = bench.recipe(task, rows)
        recipe_cpu, recipe_wall = (b - a for a, b in zip(start, clocks(), strict=True))
        start = clocks()
        found = bench.ours(task, stop="auto", seed=number)
        ours_cpu, ours_wall = (b - a for a, b in zip(start, clocks(), strict=True))
        same = bench.ours(task, rows)
        row = {
            "recipe_cpu_seconds": recipe_cpu,
            "recipe_wall_seconds": recipe_wall,
            "recipe_texts": BATCH,
            "recipe_map_bytes": held,
            "ours_cpu_seconds": ours_cpu,
            "ours_wall_seconds": ours_wall,
            "ours_texts": found.num_texts,
            "ours_agreement_promised": found.agreement,
            "ours_map_bytes": bench.map_bytes(task, rows),
            "largest_difference": max(float((same[s] - by_recipe[s]).abs().max()) for s in by_recipe),
            "spread_of_scores": float(torch.cat(list(by_recipe.values())).std()),
            "scores": {site: value.tolist() for site, value in found.items()},
        }
        append_line(file, row)
        print(f"{name}, round {number}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "scores"), flush=True)
    every = score_all(bench, task, run.work)
    memory = {way: alone(__name__, way, name, str(run.glue.absolute())) for way in ("recipe", "ours")}
    done = read_lines(file)
    for row in done:
        row["heads_that_agree"] = agreement(Scores({s: torch.tensor(v) for s, v in row.pop("scores").items()}), every)
        row["time_ratio"] = row["recipe_cpu_seconds"] / BATCH * len(task) / row["ours_cpu_seconds"]
        row["map_memory_ratio"] = row["recipe_map_bytes"] / row["ours_map_bytes"]
    summary = {
        key: [statistics.median(r[key] for r in done), min(r[key] for r in done), max(r[key] for r in done)]
        for key in ("heads_that_agree", "time_ratio", "map_memory_ratio", "ours_texts", "largest_difference")
    }
    print(name, json.dumps(summary), flush=True)
    return {
        "texts": len(task), "median_min_max": summary, "batch_peak_mb": memory, "rounds": done,
        "scores_of_every_text": {site: value.tolist() for site, value in every.items()},
    }  # fmt: skip


def measure(run: Run, *, rounds: int) -> None:
    run.work.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    run.write(
        model="all-MiniLM-L6-v2, smp with the pruner that ships",
        batch=[BATCH, LENGTH],
        seeds=list(range(rounds)),
        recipe_time="CPU seconds of the batches scored by the recipe, one a round, times all texts / 32",
        verdict="mask at half of every layer's heads from our scoring of every text",
        tasks={name: of_task(run, bench, name, rounds) for name in run.tasks},
    )


if __name__ == "__main__":
    print(json.dumps(peak(*sys.argv[1:])))
