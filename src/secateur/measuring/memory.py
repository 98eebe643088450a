"""Peak memory of a piece of work: bytes of tensors that it holds at once, beyond what was there before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from secateur.support.files import temporary_folder


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that PyTorch's allocator held at once during `run()`, beyond those held before it.

    On CUDA the allocator keeps count itself. On the CPU its allocations are read from a profile: tensors, temporary
    ones inside operators included, but not what kernels of other libraries (oneDNN, MKL) take for themselves. The
    same work gives the same number. Other devices: None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    held = most = 0
    for change in cpu_allocations(run):
        held += change
        most = max(most, held)
    return most


def cpu_allocations(run: Callable[[], Any]) -> list[int]:
    """Return the bytes of every tensor that PyTorch allocates on the CPU during `run()`, and minus those it frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()  # held until the profile ends: a result counts as long as its caller has it
    del result
    with temporary_folder() as folder:
        trace = folder / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]
