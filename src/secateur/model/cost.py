"""What a model costs: heads, parameters, multiply-accumulates, and latency of models measured in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from secateur.model.inputs import example_inputs
from secateur.model.probe import count_heads, probe
from secateur.model.state import base_of, evaluation_mode


@dataclass(frozen=True)
class ModelCost:
    """Query heads, parameters (shared ones counted once), and multiply-accumulates of one forward pass.

    `batch` and `length` say which pass: text of `batch` × `length` tokens, or images or sounds of the model's size.
    """

    heads: int
    parameters: int
    macs: int
    batch: int
    length: int

    def to_json(self) -> dict[str, int]:
        """Return plain JSON data."""
        return asdict(self)


@torch.no_grad()
def measure_cost(model: nn.Module, batch: int = 1, length: int = 128) -> ModelCost:
    """Count heads, parameters and multiply-accumulates (half of PyTorch's flop count) of the base model.

    `length` is cut to what the model's positions allow.
    """
    base = base_of(model)
    length = min(length, max_length(base, length))
    inputs = example_inputs(base, batch, length, padding=0)
    counter = FlopCounterMode(display=False)
    # PyTorch counts matrix products but not its fused CPU attention, so the pass is made with separate products.
    with evaluation_mode(base), probe(base, weights=True), counter:
        base(**inputs)
    heads = sum(h for h, _ in count_heads(base, example_inputs(base, 1)).values())
    return ModelCost(heads, count_parameters(model), counter.get_total_flops() // 2, batch, length)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def max_length(model: nn.Module, default: int = 512) -> int:
    """Return how many tokens the model has positions for, or `default` where its config does not say."""
    positions = getattr(base_of(model).config, "max_position_embeddings", None)
    # RoBERTa and its kin start counting after the padding id, which costs up to two positions.
    return positions - 2 if isinstance(positions, int) and positions > 2 else default


@torch.no_grad()
def compare_latency(
    models: Mapping[str, nn.Module],
    batch: int = 8,
    length: int = 128,
    rounds: int = 12,
    warmup: int = 3,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Time one forward pass of each model in turn, round after round, and return the seconds of every round.

    Interleaving lets a drift of the machine's speed reach all models alike: quote ratios of medians.
    """
    runs: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        base = base_of(model)
        inputs = example_inputs(base, batch, min(length, max_length(base, length)), padding=0)
        runs[name] = lambda base=base, inputs=inputs: base(**inputs)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    modes = [evaluation_mode(base_of(model)) for model in models.values()]
    for mode in modes:
        mode.__enter__()
    try:
        for number in tqdm(range(warmup + rounds), desc="timing", leave=False, disable=not progress):
            for name, run in runs.items():
                _synchronise()
                start = time.perf_counter()
                run()
                _synchronise()
                if number >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
    return seconds


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios `one / other`, pair by pair."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
