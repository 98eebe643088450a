"""What finding the heads of a model costs: seconds and memory, on a random model of BERT-base's shapes.

Each round is a process of its own, on one thread: the matrices are small, and on a busy machine threads wait for each
other longer than they work. Memory is resident memory: its peak while heads are looked for, less what the process held
before the model was built, beside the size of the model's weights. Linux only. Every round is written, with the
machine's load at its start.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from benchmarks.runs import Run, alone, memory_mb
from transformers import BertConfig, BertModel

from secateur.sites.attention import find_sites


def one_round() -> dict[str, float]:
    load, before = os.getloadavg()[0], memory_mb("VmRSS")
    model = BertModel(BertConfig()).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start, spent = time.perf_counter(), time.process_time()
    sites = find_sites(model)
    seconds, processor = time.perf_counter() - start, time.process_time() - spent
    peak = memory_mb() - before
    assert sum(site.num_units for site in sites.values()) == 144
    found = {"seconds": seconds, "processor_seconds": processor, "peak_over_weights": peak / weights, "load": load}
    return {name: round(value, 3) for name, value in (found | {"weights_mb": weights, "peak_mb": peak}).items()}


def measure(run: Run, *, rounds: int) -> None:
    rows = []
    for _ in range(rounds):
        rows.append(alone(__name__))
        print(rows[-1], flush=True)
    run.write(
        threads=run.threads,
        model="BERT-base, random: 12 layers of 12 heads",
        fastest_seconds=min(row["seconds"] for row in rows),
        largest_peak_over_weights=max(row["peak_over_weights"] for row in rows),
        rows=rows,
    )


if __name__ == "__main__":
    print(json.dumps(one_round()))
