"""How the cost of scoring grows with the number of texts and with their length.

    OMP_NUM_THREADS=1 python benchmarks/growth.py && python benchmarks/plots.py

All-MiniLM-L6-v2 on made-up tokens, no padding: 32 to 512 texts of 32 tokens in batches of 32, and 8 texts of 32 to 512
tokens. Every point in turn, round after round; CPU seconds of the process, which other work on the machine disturbs
least. Beside them the multiply-accumulates of the same pass, and those of products with attention maps alone, which
grow with the square of the tokens. Finding the heads, once a model, is not counted. Writes results/growth.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from provenance import provenance
from secateur.demo import demo_model
from secateur.measuring.cost import measure_cost
from secateur.models.inputs import example_inputs
from secateur.models.loading import load_model
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask
from secateur.sites.attention import find_sites
from secateur.support.files import write_text

SCORERS = ("contribution", "entropy")
TEXTS, TOKENS = (32, 64, 128, 256, 512), (32, 64, 128, 256, 512)
BATCH, FEW, SHORT = 32, 8, 32
ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    model = load_model(demo_model(), "cpu")
    sites = find_sites(model)
    points = [(count, SHORT, BATCH) for count in TEXTS] + [(FEW, length, FEW) for length in TOKENS]
    scorers = {name: make_scorer(name) for name in SCORERS}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for number in range(ROUNDS + 1):
        for texts, tokens, batch in points:
            made = [example_inputs(model, batch, tokens, padding=0, seed=seed) for seed in range(texts // batch)]
            for name, scorer in scorers.items():
                start = time.process_time()
                scorer.score(ScoringTask(model, sites, made))
                if number:  # the first round warms up
                    seconds.setdefault((name, texts, tokens), []).append(time.process_time() - start)
        print(f"round {number} of {ROUNDS}", flush=True)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    rows = [
        {
            "scorer": name, "texts": texts, "tokens": tokens, "cpu_seconds": values,
            "macs": texts * measure_cost(model, 1, tokens).macs,
            "attention_macs": texts * 2 * layers * tokens**2 * width,
        }
        for (name, texts, tokens), values in seconds.items()
    ]  # fmt: skip
    for row in rows:
        print(
            f"{row['scorer']:13s} {row['texts']:4d} x {row['tokens']:3d}: {statistics.median(row['cpu_seconds']):.3f} s"
        )
    result = {
        **provenance("OMP_NUM_THREADS=1 python benchmarks/growth.py", "other work beside it"),
        "rounds": ROUNDS,
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "growth.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
