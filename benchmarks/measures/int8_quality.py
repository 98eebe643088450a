"""What int8 takes from half of a sentence encoder, a third and a quarter, once they are taught.

    python -m benchmarks.run half_model --data GLUE --work WORK
    python -m benchmarks.run int8_quality --data GLUE --work WORK

all-MiniLM-L6-v2 and what `half_model` made of it, as ONNX graphs in float32 and int8, with pooling and normalisation
inside. Judged as there, by the Spearman correlation of cosines with the scores of STS-B's test pairs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measures.half_model import place_of
from benchmarks.measures.int8 import exported, similarity
from benchmarks.provenance import made
from benchmarks.runs import Run, minilm

from secateur.exporting.sentence_embedding import with_embedding
from secateur.measuring.cost import measure_cost
from secateur.models.loading import load_model

DENSE: list[Any] = ["dense", "macs=1", 0]


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    """Add a row for the dense model, and for each way, budget and number of steps in `cells` and each seed."""
    done = {(row["way"], row["budget"], row["steps"], row["seed"]) for row in run.rows()}
    dense, tokenizer = minilm()
    whole = measure_cost(dense).macs
    for way, budget, steps, seed in [(*DENSE, 0), *((*cell, seed) for seed in run.seeds for cell in cells)]:
        if (way, budget, steps, seed) in done:
            continue
        place = place_of(run.work, way, budget, steps, seed)
        if way != DENSE[0] and not place.is_dir():
            raise SystemExit(f"{place} is not there: first run half_model with the same --work")
        model = dense if way == DENSE[0] else load_model(place, "cpu")
        row = {"way": way, "budget": budget, "steps": steps, "seed": seed}
        row["macs"] = round(measure_cost(model).macs / whole, 4)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "graph")
            row |= exported(with_embedding(model, ("mean",), normalised=True), folder, tokenizer)
            row["spearman"] = similarity(run, folder, tokenizer)
        run.add({**row, **made(run.note)})
