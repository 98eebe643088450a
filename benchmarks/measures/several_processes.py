"""The same pruning by one process, by several, and by several machines: is the result the same?

    python -m benchmarks.run several_processes --data GLUE

all-MiniLM-L6-v2 to half of its multiply-accumulates by the defaults, on `texts` of SST-2, taught for `steps` updates.
Machines are launchers of their own that find each other by a port of this one. Processes share its cores, so seconds
say nothing of what more cores would give.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from benchmarks.runs import Run

from secateur.demo import demo_model


def measure(run: Run, *, layouts: list[list[int]], texts: int, steps: int) -> None:
    """Prune in each layout of machines × processes on each; write the time of each and what is equal to the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pd.DataFrame({"sentence": run.texts("sst2", texts)}).to_csv(folder / "texts.csv", index=False)
        rows: list[dict[str, Any]] = []
        for machines, processes in layouts:
            out = folder / f"{machines}x{processes}"
            start = time.perf_counter()
            launch(machines, processes, folder / "texts.csv", out, steps)
            row = {"machines": machines, "processes_on_each": processes, "seconds": round(time.perf_counter() - start)}
            first = folder / "{}x{}".format(*layouts[0])
            mine, its = (json.loads((one / "pruning_report.json").read_text()) for one in (out, first))
            weights = [(one / "model.safetensors").read_bytes() for one in (out, first)]
            same = {
                "same_scores": mine["scores"] == its["scores"],
                "same_units": mine["kept_heads"] == its["kept_heads"],
            }
            rows.append({**row, **same, "same_weights": weights[0] == weights[1], "macs": mine["after"]["macs"]})
            print(rows[-1], flush=True)
    run.write(threads=1, texts=texts, steps=steps, rows=rows)


def launch(machines: int, processes: int, texts: Path, out: Path, steps: int) -> None:
    """Run `secateur prune` under so many launchers of so many processes each. Raises where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "secateur.cli", "prune", str(demo_model()), "--data", str(texts), "--budget", "macs=0.5"]
    command += ["--steps", str(steps), "--out", str(out)]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in range(machines):
        start = [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(machines * processes),
            "--num_machines", str(machines), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
            "--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no",
        ] if machines * processes > 1 else []  # fmt: skip
        started.append(subprocess.Popen([sys.executable, *start, *command], env={**os.environ, **settings}))
    if any([one.wait() for one in started]):
        raise SystemExit(f"{machines} machines of {processes} processes failed")
