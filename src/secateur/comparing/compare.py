"""Scorers side by side: scorer x task x ratio x seed, each pruned before fine-tuning and measured after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from secateur.comparing.folder import content_of, owned, rows_by_run, run_of, scores_file
from secateur.comparing.plan import Settings, plan, scorings_of
from secateur.comparing.run import score_run, train_run
from secateur.comparing.splits import check_tasks
from secateur.comparing.workers import each, workers
from secateur.errors import invalid
from secateur.finetuning.trainer import training_device
from secateur.support.files import append_line
from secateur.support.run_files import ROWS, SCORES


def compare(
    settings: Settings, out: str | Path, *, jobs: int = 1, device: str | None = None, progress: bool = True
) -> list[dict[str, Any]]:
    """Do every run that `out` does not have yet, and return all rows in the order of `plan`.

    `out` is a folder that may be stopped at any moment and goes on where it stopped. `jobs` processes share the runs;
    with several GPUs each gets one. Rows do not depend on `jobs` or on the order, their `cost` aside.

    Raises `InvalidInputError` where `out` holds a comparison with other settings, or of a model or data whose content
    has changed since, or is in use by another run, and whatever a run raises; finished runs stay.
    """
    if jobs < 1:
        raise invalid("jobs", "be at least 1", jobs)
    out = Path(out)
    place = str(training_device(device))
    content = content_of(settings, check_tasks(settings.data))
    with owned(out, settings, content):
        rows, runs = rows_by_run(out), plan(settings)
        missing = [run for run in runs if run not in rows]
        scorings = [run for run in scorings_of(missing) if not scores_file(out, run).is_file()]
        scored = len(list((out / SCORES).glob("*.json")))
        if progress and (rows or scored):
            tqdm.write(f"going on: {scored} scorings, {len(rows)} of {len(runs)} runs are done", file=sys.stderr)
        with workers(jobs, settings.threads, place) as pool:
            for _ in each(pool, score_run, [(settings, run, out, place) for run in scorings], "scoring", progress):
                pass
            calls = [(settings, run, out, place) for run in missing]
            for row in each(pool, train_run, calls, "fine-tuning", progress):
                append_line(out / ROWS, row)
                rows[run_of(row)] = row
    return [rows[run] for run in runs]


def default_jobs(device: torch.device, threads: int) -> int:
    """Return how many runs this machine can do at once: one for each GPU, or as many as the cores have room for."""
    if device.type == "cuda":
        return torch.cuda.device_count() if device.index is None else 1
    return max(1, (os.cpu_count() or 1) // threads)
