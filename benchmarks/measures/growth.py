"""How the cost of scoring grows with the number of texts and with their length.

All-MiniLM-L6-v2 on made-up tokens, no padding: 32 to 512 texts of 32 tokens in batches of 32, and 8 texts of 32 to 512
tokens. Every point in turn, round after round; CPU seconds of the process, which other work on the machine disturbs
least. Beside them the multiply-accumulates of the same pass, and those of products with attention maps alone, which
grow with the square of the tokens. Finding the heads, once a model, is not counted. benchmarks/plots.py draws it.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.runs import Run, minilm

from secateur.measuring.cost import measure_cost
from secateur.models.inputs import example_inputs
from secateur.scorers import make_scorer
from secateur.scorers.base import ScoringTask
from secateur.texts.calibration import PreparedModel
from secateur.texts.sources import ReadyInputs

TEXTS, TOKENS = (32, 64, 128, 256, 512), (32, 64, 128, 256, 512)
BATCH, FEW, SHORT = 32, 8, 32


def measure(run: Run, *, scorers: list[str], rounds: int) -> None:
    model, _ = minilm()
    prepared = PreparedModel(model)
    sites = prepared.sites
    points = [(count, SHORT, BATCH) for count in TEXTS] + [(FEW, length, FEW) for length in TOKENS]
    made = {name: make_scorer(name) for name in scorers}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for number in range(rounds + 1):
        for texts, tokens, batch in points:
            given = [example_inputs(model, batch, tokens, padding=0, seed=seed) for seed in range(texts // batch)]
            for name, scorer in made.items():
                start = time.process_time()
                scorer.score(ScoringTask(model, sites, ReadyInputs(prepared, given)))
                if number:  # the first round warms up
                    seconds.setdefault((name, texts, tokens), []).append(time.process_time() - start)
        print(f"round {number} of {rounds}", flush=True)
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
        middle = statistics.median(row["cpu_seconds"])
        print(f"{row['scorer']:13s} {row['texts']:4d} x {row['tokens']:3d}: {middle:.3f} s")
    run.write(rounds=rounds, rows=rows)
