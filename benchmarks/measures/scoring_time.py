"""What scoring costs beside one dense pass over the same texts, run in turn.

96 STS-B-like pairs (film sentences joined in twos), 64 tokens at most, all-MiniLM-L6-v2. Prints and writes the median
ratio to the dense pass, round by round. Finding the heads, once a model, is not counted.
"""

from __future__ import annotations

import statistics
import time

import torch
from benchmarks.runs import SCORED, Run, inputs, minilm

from secateur.demo import demo_task
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask
from secateur.sites.attention import find_sites
from secateur.texts.calibration import PreparedModel
from secateur.texts.sources import ReadyInputs


def measure(run: Run, *, scorers: list[str], rounds: int) -> None:
    model, tokenizer = minilm()
    texts = demo_task()[0].texts
    made = inputs(model, tokenizer, [(texts[2 * i], texts[2 * i + 1]) for i in range(SCORED)])
    task = ScoringTask(model, find_sites(model), ReadyInputs(PreparedModel(model), made, is_pair=True))

    @torch.no_grad()
    def dense() -> None:
        for batch in made:
            model(**batch)

    by_name = {name: make_scorer(name) for name in scorers}
    ways = {"dense": dense} | {name: lambda s=scorer: s.score(task) for name, scorer in by_name.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: [own / passed for own, passed in zip(seconds[name], seconds["dense"], strict=True)] for name in scorers
    }
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} dense passes (from {min(values):.2f} to {max(values):.2f})")
    run.write(threads=run.threads, seconds=seconds, ratios=ratios)
