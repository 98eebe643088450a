"""What finding heads, neurons and layers costs: seconds and memory, on random models of known shapes.

BERT-base, and one layer of Llama-3-8B's shape (4,096 wide, 14,336 neurons, 32 heads over 8 key-value heads, a small
vocabulary). Each round is a process of its own, on one thread. Memory is resident memory: its peak meanwhile, less what
the process held before the model was built, beside the size of the model's weights. Linux only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from benchmarks.runs import Run, alone, memory_mb
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from secateur.sites.finding import find_units


def build(shape: str) -> PreTrainedModel:
    if shape == "bert-base":
        return BertModel(BertConfig()).eval()
    config = LlamaConfig(
        vocab_size=1000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    return LlamaModel(config).eval()


def one_round(shape: str) -> dict[str, object]:
    load, before = os.getloadavg()[0], memory_mb("VmRSS")
    model = build(shape)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start, spent = time.perf_counter(), time.process_time()
    sites = find_units(model)
    seconds, processor = time.perf_counter() - start, time.process_time() - spent
    peak = memory_mb() - before
    units = {
        kind: sum(s.num_units for s in sites.values() if s.kind == kind) for kind in ("heads", "neurons", "layers")
    }
    found = {"seconds": seconds, "processor_seconds": processor, "peak_over_weights": peak / weights, "load": load}
    rounded = {name: round(value, 3) for name, value in (found | {"weights_mb": weights, "peak_mb": peak}).items()}
    return {"shape": shape, **units, **rounded}


def measure(run: Run, *, rounds: int, shapes: list[str]) -> None:
    rows = []
    for _ in range(rounds):
        for shape in shapes:
            rows.append(alone(__name__, shape))
            print(rows[-1], flush=True)
    run.write(threads=run.threads, rows=rows)


if __name__ == "__main__":
    print(json.dumps(one_round(sys.argv[1])))
