"""What finding the heads of a model costs: seconds and memory, on a random model of BERT-base's shapes.

    python benchmarks/finding_heads.py [--runs 5] [--threads 1]

Each run is a process of its own, on one thread: the matrices are small, and on a busy machine threads wait for each
other longer than they work. Memory is resident memory: its peak while heads are looked for, less what
the process held before the model was built, beside the size of the model's weights. Linux only. Writes
benchmarks/results/finding_heads.json with every run and the machine's load at its start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from provenance import provenance

OUT = Path(__file__).parent / "results" / "finding_heads.json"


def run(threads: int) -> None:
    import torch
    from transformers import BertConfig, BertModel

    from secateur.sites.attention import find_sites

    torch.set_num_threads(threads)
    load, before = os.getloadavg()[0], _resident("VmRSS")
    model = BertModel(BertConfig()).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start, spent = time.perf_counter(), time.process_time()
    sites = find_sites(model)
    seconds, processor = time.perf_counter() - start, time.process_time() - spent
    peak = _resident("VmHWM") - before
    assert sum(site.num_heads for site in sites.values()) == 144
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "processor_seconds": round(processor, 3),
                "weights_mb": round(weights, 1),
                "peak_mb": round(peak, 1),
                "peak_over_weights": round(peak / weights, 3),
                "load": load,
            }
        )
    )


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inner", action="store_true", help="one run, in this process")
    options = parser.parse_args()
    if options.inner:
        run(options.threads)
        return

    rows = []
    command = [sys.executable, __file__, "--inner", "--threads", str(options.threads)]
    for _ in range(options.runs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    result = {
        **provenance("python benchmarks/finding_heads.py"),
        "threads": options.threads,
        "model": "BERT-base, random: 12 layers of 12 heads",
        "fastest_seconds": min(row["seconds"] for row in rows),
        "largest_peak_over_weights": max(row["peak_over_weights"] for row in rows),
        "rows": rows,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
