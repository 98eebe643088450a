"""A model that is larger than the memory of the process that prunes it.

    python -m benchmarks.run larger_than_memory

A Llama of random weights lies on disk. A process whose memory the kernel limits, page cache included, loads it with
every layer on disk, scores heads and neurons, reconstructs and removes half of them, and saves what is left. The
weights alone are nearly twice the limit; a process that does the same with its weights in memory is tried too. Then one
without a limit does, and compares. Linux with control groups, as root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.runs import ROOT, Run, memory_mb
from transformers import AutoModel, LlamaConfig, LlamaModel

import secateur
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.settings import Reading
from secateur.units.masks import Mask
from secateur.units.select import select

GROUPS = Path("/sys/fs/cgroup")
LAYERS, WIDTH, NEURONS, HEADS = 32, 1024, 2048, 16
TEXTS, TOKENS, BATCHES = 4, 16, 4


def measure(run: Run, *, limit_mb: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        dense, small = Path(name, "dense"), Path(name, "small")
        config = LlamaConfig(
            vocab_size=1000, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaModel(config).save_pretrained(dense, max_shard_size="200MB")
        weights = sum(file.stat().st_size for file in dense.glob("*.safetensors")) / 2**20
        with limited(limit_mb) as start:
            found = alone_in(start, "prune", dense, small, "disk")
            whole = alone_in(start, "prune", dense, Path(name, "other"), "cpu")
        if found is None:
            raise SystemExit("the process was killed")
        left = sum(file.stat().st_size for file in small.glob("*.safetensors")) / 2**20
        again = alone_in(None, "compare", dense, small)
    run.write(
        limit_mb=limit_mb, weights_mb=round(weights), left_mb=round(left), threads=run.threads, from_disk=found,
        in_memory="killed" if whole is None else whole, **(again or {}),
    )  # fmt: skip
    print(run.out.read_text())


@contextmanager
def limited(mb: int) -> Iterator[Callable[[], None]]:
    """Yield what puts a process into a group that may use so much memory, without swap."""
    old = GROUPS / "memory"
    group = (old if old.is_dir() else GROUPS) / f"secateur-{os.getpid()}"
    group.mkdir()
    try:
        limits = ["memory.limit_in_bytes"] if old.is_dir() else ["memory.max", "memory.swap.max"]
        for file, value in zip(limits, (mb * 2**20, 0), strict=False):
            (group / file).write_text(str(value))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def alone_in(start: Callable[[], None] | None, *arguments: Any) -> dict[str, Any] | None:
    """Run this module in a process of its own; return what its last line says, None where it was killed."""
    command = [sys.executable, "-m", __spec__.name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=start)
    if done.returncode == -9:
        return None
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1000, (TEXTS, TOKENS), generator=draw)} for _ in range(BATCHES)]


def prune(dense: str, small: str, place: str) -> dict[str, Any]:
    """Prune with every layer in a place; return the seconds of each step and the memory that this process had."""
    seconds: dict[str, float] = {}
    places = {"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    places |= {f"layers.{number}": place for number in range(LAYERS)}
    with timed(seconds, "load"):
        model = AutoModel.from_pretrained(dense, device_map=places).eval()
    start, inputs = memory_mb("RssAnon"), batches()
    reading = Reading(batch_size=TEXTS)
    with timed(seconds, "score"):
        scores = secateur.score(model, inputs=inputs, units=("heads", "neurons"), reading=reading)
    mask = select(scores, 0.5)
    with timed(seconds, "reconstruct"):
        before, after = secateur.reconstruct_(model, mask, inputs=inputs, reading=reading)
    with timed(seconds, "remove"):
        removal = secateur.remove_(model, mask, inputs=inputs[0])
    with timed(seconds, "save"):
        model.save_pretrained(small, max_shard_size="200MB")
    Path(small, "mask.json").write_text(json.dumps(mask.to_json()))
    memory = {"start_mb": start, "end_mb": memory_mb("RssAnon"), "peak_mb": memory_mb()}
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **{name: round(value) for name, value in memory.items()},
        "relational_kl": [before, after], "max_difference": removal.max_difference,
    }  # fmt: skip


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
    print(step, round(seconds[step], 1), "s", round(memory_mb("RssAnon")), "MB", file=sys.stderr, flush=True)


def compare(dense: str, small: str) -> dict[str, Any]:
    """Do the same where memory holds the model, and return how far what was saved is from that."""
    model, inputs = AutoModel.from_pretrained(dense).eval(), batches()
    mask = Mask.from_json(json.loads(Path(small, "mask.json").read_text()))
    secateur.reconstruct_(model, mask, inputs=inputs, reading=Reading(batch_size=TEXTS))
    secateur.remove_(model, mask, inputs=inputs[0])
    found = AutoModel.from_pretrained(small).eval()
    given = example_inputs(model)
    return {"difference_to_memory": largest_difference(hidden_states(model, given), hidden_states(found, given))}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
