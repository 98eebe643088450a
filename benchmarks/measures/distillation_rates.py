"""How fast to teach: the learning rate of the distillation after half of a sentence encoder or more has gone.

    python -m benchmarks.run distillation_rates --data GLUE

all-MiniLM-L6-v2 is pruned and reconstructed as in `half_model`, then taught in 300 updates at several rates. Judged by
the relational KL and the mean cosine to the dense model on 512 training sentences that nothing else read, so that no
text that judges elsewhere takes part in the choice.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from benchmarks.measures.half_model import SCORED, sentences
from benchmarks.provenance import made
from benchmarks.runs import Run, minilm

from secateur.pruning import prune
from secateur.restoring.distillation import distill_
from secateur.restoring.quality import QualityJudge
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel

JUDGED = 512


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    """Add a row for each budget, number of steps and learning rate in `cells`, and each seed, that there is none of."""
    done = {(row["budget"], row["steps"], row["learning_rate"], row["seed"]) for row in run.rows()}
    for seed in run.seeds:
        texts = sentences(run, seed)
        texts, held_out = texts[JUDGED:], texts[:JUDGED]
        pruned: dict[str, Any] = {}
        for budget, steps, rate in cells:
            if (budget, steps, rate, seed) in done:
                continue
            dense, tokenizer = minilm()
            judge = QualityJudge(PreparedModel(dense, tokenizer), held_out, Reading())
            reading = Reading(seed=seed, stop=SCORED, progress=False)
            if budget not in pruned:
                pruned[budget], _ = prune(
                    dense, texts, budget=budget, restore="reconstruct", scorer="contribution", tokenizer=tokenizer,
                    reading=reading,
                )  # fmt: skip
            student, start = copy.deepcopy(pruned[budget]), time.process_time()
            distill_(
                student, dense, texts, tokenizer, steps=steps, learning_rate=rate,
                reading=Reading(seed=seed, progress=False),
            )  # fmt: skip
            judge.model = judge.base = student
            seconds = round(time.process_time() - start)
            row = {"budget": budget, "steps": steps, "learning_rate": rate, "seed": seed}
            run.add({**row, "quality": judge().to_json(), "processor_seconds": seconds, **made(run.note)})
