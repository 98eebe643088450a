"""Which learning rate trains the dense model best on few texts, judged on training texts that it does not see.

1,000 training texts teach, 500 others judge, 3 epochs, seed 0; no pruned model and no dev text has a say. Prints a
Markdown table, and writes after every run; what the file has already is not measured again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from benchmarks.runs import Run, table

from secateur.demo import demo_model
from secateur.finetuning.finetune import finetune
from secateur.settings import Reading
from secateur.texts.data import Task

TAUGHT, JUDGED, LENGTH = 1000, 500, 64


def parts(task: Task) -> tuple[Task, Task]:
    """Return texts to learn from and others to judge by, drawn at random."""
    order = torch.randperm(len(task.texts), generator=torch.Generator().manual_seed(0)).tolist()

    def of(rows: list[int]) -> Task:
        return replace(task, texts=[task.texts[i] for i in rows], labels=[task.labels[i] for i in rows])

    return of(order[:TAUGHT]), of(order[TAUGHT : TAUGHT + JUDGED])


def measure(run: Run, *, rates: list[float]) -> None:
    rows = run.so_far().get("rows", [])
    for rate in rates:
        for name in run.tasks:
            if any((row["task"], row["learning_rate"]) == (name, rate) for row in rows):
                continue
            taught, judged = parts(run.task(name, need_labels=True))
            _, result = finetune(
                demo_model(),
                taught,
                judged,
                learning_rate=rate,
                reading=Reading(max_length=LENGTH, device="cpu", progress=False),
            )
            metric = result.metrics[result.main_metric]
            rows.append({"task": name, "learning_rate": rate, "metric": result.main_metric, "value": metric})
            run.write(rows=rows)
    found = {(row["task"], row["learning_rate"]): row["value"] for row in rows}
    cells = [[f"{rate:g}", *(f"{found[name, rate]:.3f}" for name in run.tasks)] for rate in rates]
    print(table(["learning rate", *run.tasks], cells))
