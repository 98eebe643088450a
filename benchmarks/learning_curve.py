"""Draw the learning curves of meta-training runs, and keep them as raw JSON.

    python benchmarks/learning_curve.py NAME=RUN_FOLDER … --title TITLE

Writes benchmarks/results/learning_curves.json and docs/learning_curves.svg: for each run the mean over tasks of the
relational KL that the deterministic top-k mask has on held-out texts, and the loss of the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from secateur.meta_training.runs import latest_checkpoint
from secateur.support.files import write_text

ROOT = Path(__file__).parents[1]


def read(folder: Path) -> dict:
    """Return a run's settings, losses and held-out values."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "config": json.loads((latest_checkpoint(folder) / "state.json").read_text())["config"],
        "losses": [[r["step"], r["losses"]] for r in rows if "losses" in r],
        "held_out": [[r["step"], r["held_out"]] for r in rows if "held_out" in r],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--title", default="Meta-training on all-MiniLM-L6-v2")
    options = parser.parse_args()
    runs = {name: read(Path(folder)) for name, folder in (run.split("=", 1) for run in options.runs)}
    write_text(ROOT / "benchmarks" / "results" / "learning_curves.json", json.dumps(runs) + "\n")
    plt.rcParams["svg.hashsalt"] = "secateur"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, run in runs.items():
        steps = [step for step, _ in run["held_out"]]
        left.plot(steps, [statistics.mean(values.values()) for _, values in run["held_out"]], "o-", label=name)
        losses = [statistics.mean(values.values()) for _, values in run["losses"]]
        window = 25
        smooth = [statistics.mean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
        scale = smooth[min(window, len(smooth)) - 1]
        right.plot([step for step, _ in run["losses"]], [x / scale for x in smooth], label=name)
    left.set(title="deterministic mask, held-out texts", xlabel="step", ylabel="relational KL (lower is better)")
    right.set(title="loss of the steps, mean of 25", xlabel="step", ylabel="relative to step 25")
    right.set_ylim(0, 3)
    left.set_ylim(bottom=0)
    left.legend()
    figure.suptitle(options.title)
    figure.savefig(ROOT / "docs" / "learning_curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
