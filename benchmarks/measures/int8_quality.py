"""What int8 takes from half of a sentence encoder, a third and a quarter, once they are taught.

    python -m benchmarks.run half_model --data GLUE --work WORK
    python -m benchmarks.run int8_quality --data GLUE --work WORK

all-MiniLM-L6-v2 and what `half_model` made of it, as ONNX graphs in float32 and int8, with pooling and normalisation
inside. Judged as there, by the Spearman correlation of cosines with the scores of STS-B's test pairs, and timed in turn
with the dense graph in float32, layer norms unfused, on tokens without padding.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measures.half_model import place_of
from benchmarks.measures.half_speed import onnx_run
from benchmarks.measures.int8 import GRAPHS, SHAPES, exported, similarity
from benchmarks.measures.onnx_norms import session
from benchmarks.provenance import made
from benchmarks.runs import Run, minilm

from secateur.exporting.onnx import save_onnx
from secateur.exporting.sentence_embedding import with_embedding
from secateur.measuring.cost import measure_cost
from secateur.measuring.onnx_graph import FILE, UNFUSED
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.inputs import example_inputs
from secateur.models.loading import load_model

DENSE: list[Any] = ["dense", "macs=1", 0]


def measure(run: Run, *, cells: list[list[Any]], rounds: int) -> None:
    """Add a row for the dense model, and for each way, budget and number of steps in `cells` and each seed."""
    done = {(row["way"], row["budget"], row["steps"], row["seed"]) for row in run.rows()}
    dense, tokenizer = minilm()
    whole = measure_cost(dense).macs
    with tempfile.TemporaryDirectory() as name:
        first, folder = Path(name, "dense"), Path(name, "graph")
        first.mkdir()
        dense = with_embedding(dense, ("mean",), normalised=True)
        save_onnx(dense, first)
        for way, budget, steps, seed in [(*DENSE, 0), *((*cell, seed) for seed in run.seeds for cell in cells)]:
            if (way, budget, steps, seed) in done:
                continue
            place = place_of(run.work, way, budget, steps, seed)
            if way != DENSE[0] and not place.is_dir():
                raise SystemExit(f"{place} is not there: first run half_model with the same --work")
            row = {"way": way, "budget": budget, "steps": steps, "seed": seed, "macs": 1.0}
            model = dense
            if way != DENSE[0]:
                model = load_model(place, "cpu")
                row["macs"] = round(measure_cost(model).macs / whole, 4)
                model = with_embedding(model, ("mean",), normalised=True)
            row |= exported(model, folder, tokenizer)
            row["spearman"] = similarity(run, folder, tokenizer)
            row["beside_dense_float32"] = speed(run, model, first, folder, rounds)
            run.add({**row, **made(run.note)})
            shutil.rmtree(folder)


def speed(run: Run, model: Any, first: Path, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return how many times as fast as the dense float32 graph each graph in `folder` is, for each shape."""
    found: dict[str, dict[str, float]] = {graph: {} for graph in GRAPHS}
    for shape in SHAPES:
        inputs = example_inputs(model, *shape, padding=0)
        files = {"dense": first / FILE} | {graph: folder / file for graph, file in GRAPHS.items()}
        runs = {name: onnx_run(session(file, run.threads, UNFUSED), inputs) for name, file in files.items()}
        seconds = time_in_turn(runs, rounds)
        for graph in GRAPHS:
            found[graph]["x".join(map(str, shape))] = round(median_ratio(seconds["dense"], seconds[graph]), 3)
    return found
