"""The learning curves of meta-training runs, from their logs; benchmarks/plots.py draws them.

For each run the mean over tasks of the relational KL that the deterministic top-k mask has on held-out texts, and the
loss of the steps. `runs`: name → the folder that `secateur meta-train` wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.runs import Run

from secateur.meta_training.runs import latest_checkpoint
from secateur.support.files import write_text


def read(folder: Path) -> dict[str, Any]:
    """Return a run's settings, losses and held-out values."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "config": json.loads((latest_checkpoint(folder) / "state.json").read_text())["config"],
        "losses": [[r["step"], r["losses"]] for r in rows if "losses" in r],
        "held_out": [[r["step"], r["held_out"]] for r in rows if "held_out" in r],
    }


def measure(run: Run, *, runs: dict[str, str]) -> None:
    found = {name: read(Path(folder)) for name, folder in runs.items()}
    write_text(run.out, json.dumps(found) + "\n")
