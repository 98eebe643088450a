"""What takes ONNX Runtime's time in half of a model, and what it gives to leave its layer norms unfused.

all-MiniLM-L6-v2, dense and cut to shares of its multiply-accumulates by heads and neurons, the same share at every
site, not restored. ONNX Runtime runs each with all of its graph optimisers, and without the one that fuses an addition
and a layer norm, in turn, on tokens without padding. Writes the seconds of every round, and for 8 x 128 tokens which
operations they go to.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime
from benchmarks.measures.half_speed import SHAPES, WAYS, onnx_run
from benchmarks.runs import Run, minilm

from secateur.exporting.onnx import save_onnx
from secateur.measuring.cost import measure_cost
from secateur.measuring.onnx_graph import FILE, UNFUSED
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.inputs import example_inputs
from secateur.pruning import prune
from secateur.support.versions import environment

OPTIMISERS: dict[str, list[str]] = {"all": [], "norms unfused": UNFUSED}


def measure(run: Run, *, budgets: list[str], rounds: int) -> None:
    """Time the dense model and one for each budget."""
    model, tokenizer = minilm()
    models = {"dense": model}
    for budget in budgets:
        models[budget], _ = prune(model, None, budget=budget, restore="none", tokenizer=tokenizer, **WAYS["uniform"])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in models}
        for name, place in files.items():
            place.mkdir()
            save_onnx(models[name], place)
        for shape in SHAPES:
            inputs = {name: example_inputs(one, *shape, padding=0) for name, one in models.items()}
            runs = {
                (name, how): onnx_run(session(files[name] / FILE, run.threads, left_out), inputs[name])
                for name in models
                for how, left_out in OPTIMISERS.items()
            }
            seconds = time_in_turn(runs, rounds)
            for (name, how), values in seconds.items():
                row = {"model": name, "macs": round(measure_cost(models[name]).macs / measure_cost(model).macs, 4)}
                row |= {"shape": "x".join(map(str, shape)), "optimisers": how}
                row["beside_dense"] = round(median_ratio(seconds["dense", how], values), 3)
                row["beside_dense_with_all"] = round(median_ratio(seconds["dense", "all"], values), 3)
                print(row, flush=True)
                rows.append({**row, "seconds": values})
        for name in models:
            for how, left_out in OPTIMISERS.items():
                spent = spent_on(files[name], run.threads, left_out, example_inputs(models[name], 8, 128, padding=0))
                rows.append({"model": name, "optimisers": how, "shape": "8x128", "milliseconds_by_operation": spent})
    versions = {**environment(), "onnxruntime": onnxruntime.__version__}
    run.write(versions=versions, threads=run.threads, rounds=rounds, rows=rows)


def session(file: Path, threads: int, left_out: list[str], profile: Path | None = None) -> Any:
    """Return a session of one model, without the graph optimisers in `left_out`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out)


def spent_on(folder: Path, threads: int, left_out: list[str], inputs: Any, passes: int = 10) -> dict[str, float]:
    """Return the milliseconds that each operation takes in a pass."""
    one = session(folder / FILE, threads, left_out, folder / "profile")
    step = onnx_run(one, inputs)
    for _ in range(passes):
        step()
    events = json.loads(Path(one.end_profiling()).read_text())
    spent: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: round(value / 1000 / passes, 3) for name, value in spent.most_common(8)}
