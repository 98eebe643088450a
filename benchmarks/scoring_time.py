"""What scoring costs beside one dense pass over the same texts, run in turn.

    python benchmarks/scoring_time.py

96 STS-B-like pairs (film sentences joined in twos), 64 tokens at most, all-MiniLM-L6-v2. Prints and writes the median
ratio to the dense pass, round by round (results/scoring_time.json). Finding the heads, once a model, is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import torch

from provenance import provenance
from secateur.demo import demo_model, demo_task
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask
from secateur.sites.attention import find_sites
from secateur.support.files import write_text
from secateur.texts.data import batches

SCORERS = ["contribution", "matching", "entropy", "smp", "smp-plus", "relational_taylor"]
ROUNDS = 5


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    texts = demo_task()[0].texts
    pairs = [(texts[2 * i], texts[2 * i + 1]) for i in range(96)]
    made = forward_arguments(model, batches(tokenizer, pairs, 32, 64))
    task = ScoringTask(model, find_sites(model), made, is_pair=True)
    scorers = {name: make_scorer(name) for name in SCORERS}

    def dense() -> None:
        with torch.no_grad():
            for batch in made:
                model(**batch)

    seconds: dict[str, list[float]] = {name: [] for name in ["dense", *SCORERS]}
    for number in range(ROUNDS + 1):
        for name in seconds:
            start = time.perf_counter()
            dense() if name == "dense" else scorers[name].score(task)
            if number:
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: [own / passed for own, passed in zip(seconds[name], seconds["dense"], strict=True)] for name in SCORERS
    }
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} dense passes (from {min(values):.2f} to {max(values):.2f})")
    result = {
        **provenance("python benchmarks/scoring_time.py"),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratios": ratios,
    }
    write_text(Path(__file__).parent / "results" / "scoring_time.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
