"""Timing in turn: several things, round after round, so that a drift of the machine's speed reaches all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

Clock = Literal["wall", "cpu"]
MIN_SECONDS = 0.1
"""What one thing is run for in one round, at least; one pass before it, which warms up, is not counted."""


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    min_seconds: float = MIN_SECONDS,
    clock: Clock = "wall",
    progress: bool = False,
) -> dict[str, list[float]]:
    """Return, for each of `runs`, the median seconds of a call in every round.

    Every second round goes backwards, so that none always follows the same other. PyTorch's own timer waits for the
    device, keeps the garbage collector away, and repeats what is short until `min_seconds` are full. The clock "cpu"
    counts what this process computes, summed over its threads: for one thread on a machine that is busy besides.
    """
    options: dict[str, Any] = {"num_threads": torch.get_num_threads()}
    if clock == "cpu":
        options["timer"] = time.process_time
    timers = {name: Timer("run()", globals={"run": run}, **options) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds), desc="timing", leave=False, disable=not progress):
        for name in timers if number % 2 == 0 else reversed(timers):
            seconds[name].append(timers[name].blocked_autorange(min_run_time=min_seconds).median)
    return seconds


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios `one / other`, round by round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the quarter, the half and the three quarters below which values lie; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
