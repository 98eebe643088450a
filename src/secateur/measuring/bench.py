"""What pruning saves on this machine: latency, throughput, peak memory, training steps; models measured in turn."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import invalid
from secateur.measuring.cost import count_macs, forward_pass
from secateur.measuring.memory import peak_bytes
from secateur.measuring.onnx_graph import OnnxGraph
from secateur.measuring.timing import Clock, quartiles, time_in_turn
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs, max_length
from secateur.models.state import evaluation_mode, gradients_for_all, random_states_kept
from secateur.settings import Shape, parse_shape
from secateur.support.checks import check_whole
from secateur.support.defaults import BENCHMARK_ROUNDS, BENCHMARK_SHAPES
from secateur.support.interrupts import interruptible, undoing
from secateur.support.versions import environment

SHAPES = tuple(map(parse_shape, BENCHMARK_SHAPES))


@dataclass(frozen=True)
class Measured:
    """What one model took for one kind of work at one shape, beside the first model of the benchmark.

    `work` is "pass" (no gradients) or "training step". `seconds` holds the median of every round. `speed_up` are the
    quartiles, over rounds, of the first model's time divided by this one's; `limit` is the same ratio of
    multiply-accumulates, and `efficiency` how much of that limit the median speed-up reaches. `peak_bytes` are those
    of tensors beyond the weights, None where the device or the runtime does not tell.
    """

    model: str
    shape: Shape
    work: str
    macs: int
    seconds: list[float]
    speed_up: tuple[float, float, float]
    limit: float
    peak_bytes: int | None

    @property
    def efficiency(self) -> float:
        """Return the median speed-up as a share of the one that multiply-accumulates would give."""
        return self.speed_up[1] / self.limit

    @property
    def texts_per_second(self) -> float:
        """Return how many texts of that length the median round gets through in a second."""
        return self.shape.batch / quartiles(self.seconds)[1]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "model": self.model,
            "shape": str(self.shape),
            "work": self.work,
            "macs": self.macs,
            "seconds": self.seconds,
            "texts_per_second": self.texts_per_second,
            "speed_up_quartiles": list(self.speed_up),
            "limit": self.limit,
            "efficiency": self.efficiency,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Benchmark:
    """The rows of a benchmark and where it ran; `load`: the machine's load average before and after, if it has one."""

    rows: list[Measured]
    weight_bytes: dict[str, int]
    machine: dict[str, Any]
    load: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "kind": "benchmark",
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": environment(),
            "machine": self.machine,
            "load_average": self.load,
            "weight_bytes": self.weight_bytes,
            "rows": [row.to_json() for row in self.rows],
        }


@interruptible
def benchmark(
    models: Mapping[str, nn.Module | OnnxGraph],
    shapes: Sequence[Shape] = SHAPES,
    *,
    rounds: int = BENCHMARK_ROUNDS,
    train: bool = False,
    clock: Clock = "wall",
    progress: bool = False,
) -> Benchmark:
    """Measure base models in turn at each shape, on made-up text without padding; others are held against the first.

    Graphs are run by ONNX Runtime, beside models that PyTorch runs. `train` measures training steps too: forward and
    backward pass and AdamW, on copies. Shapes longer than the models have positions for are cut. `clock` is that of
    `time_in_turn`. Raises `InvalidInputError` for no models, no shapes, rounds below 1, another clock, and training
    steps of graphs.
    """
    if not models:
        raise invalid("models", "name at least one model", list(models))
    if not shapes:
        raise invalid("shapes", "name at least one shape", list(shapes))
    if clock not in get_args(Clock):
        raise invalid("clock", "be 'wall' or 'cpu'", clock)
    check_whole("rounds", rounds)
    graphs = {name: model for name, model in models.items() if isinstance(model, OnnxGraph)}
    if train and graphs:
        raise invalid("train", "be left out where a model is an ONNX graph, which only runs", list(graphs))
    bases = {n: m.base if isinstance(m, OnnxGraph) else base_of(m) for n, m in models.items()}
    load = _load()
    rows: list[Measured] = []
    for shape in dict.fromkeys(_cut(shape, bases) for shape in shapes):
        macs = {name: count_macs(base, shape.batch, shape.length)[0][""] for name, base in bases.items()}
        for work, prepared in (("pass", partial(_passes, graphs)), ("training step", _training_steps)):
            if work == "pass" or train:
                with prepared(bases, shape) as runs:
                    peaks, seconds = _measure(runs, bases, graphs, rounds, clock, progress)
                rows += _compared(work, shape, macs, peaks, seconds)
    weights = {name: sum(p.numel() * p.element_size() for p in base.parameters()) for name, base in bases.items()}
    weights |= {name: graph.weight_bytes for name, graph in graphs.items()}
    return Benchmark(rows, weights, machine_of(next(iter(bases.values())).device, clock), load + _load())


def _measure(
    runs: Mapping[str, Callable[[], Any]], bases: Mapping[str, PreTrainedModel], graphs: Collection[str], rounds: int,
    clock: Clock, progress: bool,
) -> tuple[dict[str, int | None], dict[str, list[float]]]:  # fmt: skip
    """Return each model's peak memory, where PyTorch allocates it, and seconds."""
    # Before anything else has run: the states of an optimiser appear in its first step, and stay.
    peaks = {
        name: None if name in graphs else peak_bytes(partial(_twice, run), bases[name].device)
        for name, run in runs.items()
    }
    return peaks, time_in_turn(runs, rounds, clock=clock, progress=progress)


def _compared(
    work: str,
    shape: Shape,
    macs: Mapping[str, int],
    peaks: Mapping[str, int | None],
    seconds: Mapping[str, list[float]],
) -> list[Measured]:
    """Hold what was measured against the first model."""
    first = next(iter(macs))
    found = []
    for name in macs:
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        limit = macs[first] / macs[name]
        found.append(Measured(name, shape, work, macs[name], seconds[name], quartiles(ratios), limit, peaks[name]))
    return found


@undoing
def _passes(
    graphs: Mapping[str, OnnxGraph], bases: Mapping[str, PreTrainedModel], shape: Shape
) -> Iterator[dict[str, Callable[[], Any]]]:
    with torch.no_grad(), ExitStack() as modes:
        for base in bases.values():
            modes.enter_context(evaluation_mode(base))
        yield {
            name: graphs[name].forward_pass(*shape) if name in graphs else forward_pass(base, *shape)
            for name, base in bases.items()
        }


@undoing
def _training_steps(bases: Mapping[str, PreTrainedModel], shape: Shape) -> Iterator[dict[str, Callable[[], Any]]]:
    copies = {name: copy.deepcopy(base).train() for name, base in bases.items()}
    with random_states_kept(), ExitStack() as modes:  # dropout draws from it
        for base in copies.values():
            modes.enter_context(gradients_for_all(base))
        yield {name: _training_step(base, shape) for name, base in copies.items()}


def _training_step(base: PreTrainedModel, shape: Shape) -> Callable[[], None]:
    """Return a call that takes one step on a stand-in for a loss, at rate 0: each step finds the same weights."""
    inputs = example_inputs(base, shape.batch, shape.length, padding=0)
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.0, fused=True)  # as the Trainer does

    def step() -> None:
        base(**inputs)[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _twice(run: Callable[[], Any]) -> None:
    run()
    run()


def _cut(shape: Shape, bases: Mapping[str, PreTrainedModel]) -> Shape:
    return Shape(shape.batch, min([shape.length, *(max_length(base, shape.length) for base in bases.values())]))


def machine_of(device: torch.device, clock: Clock) -> dict[str, Any]:
    """Return what was measured on, as plain JSON data."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or str(device),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "clock": clock,
        "threads": torch.get_num_threads(),
    }


def _load() -> list[float]:
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []
