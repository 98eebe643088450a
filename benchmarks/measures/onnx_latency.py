"""Latency of all-MiniLM-L6-v2, dense and with half of its heads, in ONNX Runtime and in PyTorch, run in turn.

One process, as many threads for both runtimes; no padding; 1 × 128 and 8 × 128 tokens. Prints medians with the range
over the rounds, and ratios of medians; writes every time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from benchmarks.runs import Run

from secateur.demo import MAX_LENGTH, demo_model, demo_task
from secateur.exporting.export import export_onnx
from secateur.measuring.onnx_graph import FILE
from secateur.models.loading import load_model
from secateur.pruning import prune
from secateur.settings import Reading
from secateur.support.defaults import CALIBRATION_TEXTS
from secateur.support.versions import environment

SHAPES = ((1, 128), (8, 128))


def measure(run: Run, *, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = seconds_by_shape(Path(folder), run.threads, rounds)
    for shape, seconds in cells.items():
        for name, values in seconds.items():
            spread = f"{1000 * min(values):.1f} to {1000 * max(values):.1f}"
            print(f"{shape} tokens, {name}: {1000 * statistics.median(values):.1f} ms ({spread})")
        for runtime in ("onnx", "torch"):
            print(f"{shape} tokens, {runtime}: pruned / dense {_ratio(seconds, runtime):.3f}")
    run.write(
        versions={**environment(), "onnxruntime": onnxruntime.__version__},
        threads=run.threads,
        rounds=rounds,
        seconds=cells,
        pruned_over_dense={
            shape: {runtime: _ratio(seconds, runtime) for runtime in ("onnx", "torch")}
            for shape, seconds in cells.items()
        },
    )


def seconds_by_shape(folder: Path, threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return, by shape, the seconds of every round for each runtime and model."""
    pruned, _ = prune(
        demo_model(),
        demo_task()[0].head(CALIBRATION_TEXTS).texts,
        restore="none",
        reading=Reading(max_length=MAX_LENGTH, device="cpu"),
    )
    pruned.save_pretrained(folder / "pruned")
    models = {"dense": load_model(demo_model(), "cpu"), "pruned": pruned}
    sessions = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads that spin would take the cores from whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, source in {"dense": demo_model(), "pruned": folder / "pruned"}.items():
        export_onnx(source, folder / f"{name}-onnx")
        path = folder / f"{name}-onnx" / FILE
        sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cells = {}
    for batch, length in SHAPES:
        ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        runs = {f"onnx {name}": _onnx_run(session, inputs) for name, session in sessions.items()}
        runs |= {f"torch {name}": _torch_run(model, inputs) for name, model in models.items()}
        cells[f"{batch}x{length}"] = _in_turn(runs, rounds)
    return cells


def _onnx_run(session: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return lambda: session.run(None, arrays)


def _torch_run(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return model(**inputs)

    return run


def _in_turn(runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Interleave, so that a drift of the machine's speed reaches all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(seconds: dict[str, list[float]], runtime: str) -> float:
    return statistics.median(seconds[f"{runtime} pruned"]) / statistics.median(seconds[f"{runtime} dense"])
