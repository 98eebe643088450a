"""Which learning rate trains the dense model best on few texts, judged on training texts that it does not see.

    OMP_NUM_THREADS=1 python benchmarks/learning_rates.py --glue GLUE [--tasks stsb sst2] [--rates 2e-5 5e-5 1e-4 3e-4]

GLUE is a folder with one folder a task. 1,000 training texts teach, 500 others judge, 3 epochs, seed 0; no pruned model
and no dev text has a say. Prints a Markdown table and writes results/learning_rates.json after every run; what the file
has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from provenance import provenance
from secateur.demo import demo_model
from secateur.finetuning.finetune import finetune
from secateur.support.files import read_json, write_text
from secateur.texts.data import Task, load_task

OUT = Path(__file__).parent / "results" / "learning_rates.json"
TAUGHT, JUDGED, LENGTH = 1000, 500, 64


def parts(task: Task) -> tuple[Task, Task]:
    """Return texts to learn from and others to judge by, drawn at random."""
    order = torch.randperm(len(task.texts), generator=torch.Generator().manual_seed(0)).tolist()

    def of(rows: list[int]) -> Task:
        return replace(task, texts=[task.texts[i] for i in rows], labels=[task.labels[i] for i in rows])

    return of(order[:TAUGHT]), of(order[TAUGHT : TAUGHT + JUDGED])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--tasks", nargs="*", default=["stsb", "sst2"])
    parser.add_argument("--rates", nargs="*", type=float, default=[2e-5, 5e-5, 1e-4, 3e-4])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    rows = read_json(OUT)["rows"] if OUT.is_file() else []
    for rate in options.rates:
        for name in options.tasks:
            if any((row["task"], row["learning_rate"]) == (name, rate) for row in rows):
                continue
            taught, judged = parts(load_task(options.glue / name, "train", need_labels=True))
            _, result = finetune(
                demo_model(), taught, judged, learning_rate=rate, max_length=LENGTH, device="cpu", progress=False
            )
            metric = result.metrics[result.main_metric]
            rows.append({"task": name, "learning_rate": rate, "metric": result.main_metric, "value": metric})
            about = {
                **provenance("OMP_NUM_THREADS=1 python benchmarks/learning_rates.py --glue GLUE"),
            }
            write_text(OUT, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    found = {(row["task"], row["learning_rate"]): row["value"] for row in rows}
    print("| learning rate | " + " | ".join(options.tasks) + " |", "|---" * (len(options.tasks) + 1) + "|", sep="\n")
    for rate in options.rates:
        print(f"| {rate:g} | " + " | ".join(f"{found[name, rate]:.3f}" for name in options.tasks) + " |")


if __name__ == "__main__":
    main()
