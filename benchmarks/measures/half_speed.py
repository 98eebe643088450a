"""How much faster a half, a third and a quarter of a model run, and what takes the rest.

all-MiniLM-L6-v2, and BERT-base's shape with random weights; cut to a share of their multiply-accumulates by heads and
neurons, the same share at every site or by need (MiniLM), or by whole layers. Dense and cut models run in turn, in
PyTorch and in ONNX Runtime, on 1 x 128 and 8 x 128 tokens without padding. Nothing is restored: values cost no time.
Writes the seconds of every round, and for PyTorch which operations they go to.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from benchmarks.runs import Run, minilm
from transformers import BertConfig, BertModel

from secateur.demo import demo_task
from secateur.exporting.onnx import save_onnx
from secateur.measuring.cost import forward_pass, measure_cost
from secateur.measuring.onnx_graph import FILE
from secateur.measuring.timing import median_ratio, time_in_turn
from secateur.models.inputs import example_inputs
from secateur.pruning import prune
from secateur.settings import Cut, Reading
from secateur.support.versions import environment

SHAPES = ((1, 128), (8, 128))
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"scorer": "random", "cut": Cut(allocation="uniform")},
    "by need": {"scorer": "contribution", "cut": Cut(allocation="sensitivity")},
    "layers": {"scorer": "random", "cut": Cut(allocation="uniform", units=["layers"])},
}


def measure(run: Run, *, cells: list[list[Any]], rounds: int) -> None:
    """Time each subject with all of its cuts: `cells` are of a subject, a way and a budget."""
    result = []
    for subject in dict.fromkeys(cell[0] for cell in cells):
        model, tokenizer = minilm() if subject == "minilm" else (BertModel(BertConfig()).eval(), None)
        texts = demo_task()[0].head(256).texts if tokenizer else None
        models = {"dense": model}
        for _, way, budget in (cell for cell in cells if cell[0] == subject):
            models[f"{way} {budget}"], _ = prune(
                model, texts, budget=budget, restore="none", tokenizer=tokenizer, reading=Reading(max_length=64),
                **WAYS[way],
            )  # fmt: skip
        dense = measure_cost(model).macs
        shares = {name: round(measure_cost(one).macs / dense, 4) for name, one in models.items()}
        for shape in SHAPES:
            seconds = in_both_runtimes(models, shape, run.threads, rounds)
            for name, values in seconds.items():
                runtime, _, cut = name.partition(": ")
                speed_up = median_ratio(seconds[f"{runtime}: dense"], values)
                row = {"subject": subject, "shape": "x".join(map(str, shape)), "runtime": runtime, "cut": cut}
                row |= {"macs": shares[cut], "speed_up": round(speed_up, 3)}
                print(row, flush=True)
                result.append({**row, "seconds": values})
        operations = {name: spent_on(one) for name, one in models.items()}
        result.append({"subject": subject, "shape": "8x128", "milliseconds_by_operation": operations})
    versions = {**environment(), "onnxruntime": onnxruntime.__version__}
    run.write(versions=versions, threads=run.threads, rounds=rounds, rows=result)


def in_both_runtimes(
    models: dict[str, Any], shape: tuple[int, int], threads: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of every round, by runtime and model, all of them in turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads that spin would take the cores from whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs: dict[str, Callable[[], Any]] = {}
        for number, (name, model) in enumerate(models.items()):
            runs[f"torch: {name}"] = forward_pass(model, *shape)
            place = Path(folder) / str(number)
            place.mkdir()
            save_onnx(model, place)
            session = onnxruntime.InferenceSession(place / FILE, options, providers=["CPUExecutionProvider"])
            runs[f"onnx: {name}"] = onnx_run(session, example_inputs(model, *shape, padding=0))
        return time_in_turn(runs, rounds)


def onnx_run(session: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    zeros = torch.zeros_like(inputs["input_ids"])  # of the segments, which example inputs leave out
    arrays = {one.name: inputs.get(one.name, zeros).numpy() for one in session.get_inputs()}
    return lambda: session.run(None, arrays)


@torch.inference_mode()
def spent_on(model: Any, passes: int = 10) -> dict[str, float]:
    """Return the milliseconds that each operation of PyTorch takes itself in a pass of 8 x 128 tokens."""
    step = forward_pass(model, 8, 128)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(passes):
            step()
    spent = Counter({event.key: event.self_cpu_time_total / 1000 / passes for event in profiler.key_averages()})
    return {name: round(value, 3) for name, value in spent.most_common(8)}
