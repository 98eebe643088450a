"""When the joint meta-pruner's networks may be trusted: where they agree with each other.

    OMP_NUM_THREADS=1 python benchmarks/trust.py --fits DIR

DIR holds what `joint_pruner.py unseen --samples results/joint_samples --out DIR` made: a fit without each task, and one
without each family of models. Each is held against the samples that it was fitted without: the mean correlation between
its networks' scores, and the trial loss (0: the scores explain which masks are good, 1: they say nothing, 2: the wrong
way; mean over scopes, ratios and samples) of the contribution, of the networks alone, and of the score that they go
into. Writes results/trust.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from pathlib import Path

import torch

from joint_pruner import TASKS, family, load, task_of
from secateur.files import write_text
from secateur.meta.joint import JointPruner, contribution_scores
from secateur.meta.joint_training import Sample, trial_loss
from secateur.versions import environment

RESULTS = Path(__file__).parent / "results"
MODEL = "minilm"  # whose samples are of the tasks


@torch.no_grad()
def row(pruner: JointPruner, sample: Sample) -> dict[str, float]:
    """Return what one fit makes of one sample that it has not seen."""
    (members,) = pruner.judge_all([sample.evidence])
    count = len(members)
    standardised = (members - members.mean(dim=1, keepdim=True)) / members.std(dim=1, correction=0, keepdim=True)
    agreement = (torch.corrcoef(members).sum() - count) / (count * (count - 1))
    scores = {
        "contribution": contribution_scores(sample.evidence),
        "networks": standardised.mean(dim=0),
        "score": pruner(sample.evidence),
    }
    losses = {f"loss of {name}": float(trial_loss(values.float(), sample)) for name, values in scores.items()}
    return {"agreement": float(agreement), **losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    samples, _ = load(RESULTS / "joint_samples")
    families = list(dict.fromkeys(family(sample.subject) for sample in samples))
    rows = []
    for unseen, name in [("task", name) for name in TASKS] + [("model", name) for name in families]:
        pruner = JointPruner.from_pretrained(str(options.fits / name)).eval()
        for sample in samples:
            known = task_of(sample.task) if unseen == "task" and sample.subject == MODEL else family(sample.subject)
            if known == name:
                rows.append({"unseen": unseen, "name": name, "sample": sample.subject, **row(pruner, sample)})
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/trust.py --fits DIR",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread of 2 cores, no GPU",
        "versions": environment(),
        "rows": rows,
    }
    write_text(RESULTS / "trust.json", json.dumps(result, indent=1) + "\n")
    columns = ["agreement", "loss of contribution", "loss of networks", "loss of score"]
    print("| unseen | samples | " + " | ".join(columns) + " |", "|---" * 6 + "|", sep="\n")
    for unseen, name in dict.fromkeys((one["unseen"], one["name"]) for one in rows):
        chosen = [one for one in rows if (one["unseen"], one["name"]) == (unseen, name)]
        means = " | ".join(f"{statistics.mean(one[column] for one in chosen):.2f}" for column in columns)
        print(f"| {unseen} {name} | {len(chosen)} | {means} |")


if __name__ == "__main__":
    main()
