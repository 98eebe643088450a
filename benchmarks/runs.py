"""What experiments share: their settings, the model and the tasks, and how a result is written and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

from secateur.demo import demo_model
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.support.files import append_line, read_json, read_lines, write_text
from secateur.texts.data import Task, load_task
from secateur.texts.tokenization import batches

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TASKS = ("mnli", "qqp", "sst2", "cola", "stsb", "mrpc", "rte", "qnli")
SCORED, JUDGED, LENGTH, BATCH = 96, 128, 64, 32  # texts that give scores, texts that judge masks, tokens, texts at once


@dataclass(frozen=True)
class Run:
    """One run of an experiment: the settings that every experiment knows, and the file that it writes.

    `data`: a folder with one folder a task; `fits`: a folder with a fit of smp-plus without each task, from
    `benchmarks.joint_pruner.fit --unseen`; `work`: where a long run keeps what it has done.
    """

    name: str
    out: Path
    command: str
    threads: int
    work: Path
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = TASKS
    device: str = "cpu"
    jobs: int = 1
    note: str = ""
    data: Path | None = None
    fits: Path | None = None

    @property
    def glue(self) -> Path:
        """The folder of the tasks."""
        return _given(self.data, "--data: a folder with one folder a task")

    def unseen(self, task: str) -> dict[str, str]:
        """Return the option of smp-plus that has it score with what was fitted without the task."""
        fits = _given(self.fits, "--fits: python -m benchmarks.joint_pruner.fit --unseen --out FITS")
        return {"pruner": str(fits / task)}

    def options(self, scorer: str, task: str) -> dict[str, str]:
        """Return a scorer's options on a task that must count as unseen."""
        return self.unseen(task) if scorer == "smp-plus" else {}

    def task(self, name: str, split: str = "train", need_labels: bool = False) -> Task:
        return load_task(self.glue / name, split, need_labels=need_labels)

    def texts(self, task: str, count: int = SCORED, seed: int = 0) -> list[Any]:
        """Return training texts of a task, drawn by the seed."""
        return self.task(task).head(count, seed=seed).texts

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that a `.jsonl` result has already."""
        return read_lines(self.out)

    def add(self, row: dict[str, Any]) -> None:
        append_line(self.out, row)

    def so_far(self) -> dict[str, Any]:
        """Return what a `.json` result has already."""
        return read_json(self.out) if self.out.is_file() else {}

    def write(self, **content: Any) -> None:
        """Write a `.json` result: the header, then the content, which may replace a part of the header."""
        result = {**provenance(self.command, self.note), **content}
        write_text(self.out, json.dumps(result, indent=1) + "\n")


def _given(folder: Path | None, what: str) -> Path:
    if folder is None:
        raise SystemExit(f"this experiment needs {what}")
    return folder


def minilm() -> tuple[Any, Any]:
    """Return all-MiniLM-L6-v2 of the demo extra, in evaluation mode, and its tokenizer."""
    return load_model(demo_model(), "cpu"), load_tokenizer(demo_model())


def inputs(model: Any, tokenizer: Any, texts: list[Any], length: int = LENGTH, batch: int = BATCH) -> list[dict]:
    """Return texts as batches of the model's keyword arguments."""
    return list(forward_arguments(model, batches(tokenizer, texts, batch, length)))


def alone(module: str, *arguments: str) -> Any:
    """Run a module of the benchmarks in a process of its own; return what its last line says, as JSON."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_mb(field: str = "VmHWM") -> float:
    """Return this process's resident memory in MB, at its peak unless told `VmRSS`. Linux only.

    `resource.getrusage` would count in what the process that started this one held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
