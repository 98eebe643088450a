"""When the joint meta-pruner's networks may be trusted: where they agree with each other.

    OMP_NUM_THREADS=1 python benchmarks/trust.py --fits DIR --glue GLUE

DIR holds what `joint_pruner.py unseen --samples results/joint_samples --out DIR` made: a fit without each task, and one
without each family of models. Each is held against the samples that it was fitted without: the mean correlation between
its networks' scores, and the trial loss (0: the scores explain which masks are good, 1: they say nothing, 2: the wrong
way; mean over scopes, ratios and samples) of the contribution, of the networks alone, and of the score that they go
into. Then the fits without a task, and the one without MiniLM, are asked on the 16 draws of texts of representations.py
and of the rivals' table how far their networks are trusted. GLUE is a folder with one folder a task. Writes
results/trust.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from joint_pruner import LENGTH, SCORED, TASKS, family, load, task_of
from provenance import provenance
from secateur.demo import demo_model
from secateur.meta_training.fitting import trial_loss
from secateur.meta_training.sample import Sample
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.pruners.evidence import contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner, agreement, standardised, trust
from secateur.sites.attention import find_sites
from secateur.support.files import write_text
from secateur.texts.data import batches, load_task

RESULTS = Path(__file__).parent / "results"
MODEL = "minilm"  # whose samples are of the tasks
DRAWS = 2


@torch.no_grad()
def row(pruner: JointPruner, sample: Sample) -> dict[str, float]:
    """Return what one fit makes of one sample that it has not seen."""
    (members,) = pruner.member_scores([sample.evidence])
    members = standardised(members)
    scores = {
        "contribution": contribution_scores(sample.evidence),
        "networks": members.mean(dim=0),
        "score": pruner(sample.evidence),
    }
    losses = {f"loss of {name}": float(trial_loss(values.float(), sample)) for name, values in scores.items()}
    return {"agreement": float(agreement(members)), **losses}


@torch.no_grad()
def trust_on_texts(fits: Path, glue: Path) -> list[dict[str, Any]]:
    """Return the trust in the fit without the task, and in the one without the model, for each task and draw."""
    model, tokenizer = load_model(demo_model(), "cpu").eval(), load_tokenizer(demo_model())
    sites, rows = find_sites(model), []
    for task, seed in itertools.product(TASKS, range(DRAWS)):
        texts = load_task(glue / task, "train").head(SCORED, seed=seed)
        made = forward_arguments(model, batches(tokenizer, texts.texts, 32, LENGTH))
        evidence = gather_evidence(model, sites, made, texts.is_pair, maps=False)
        for unseen, name in (("task", task), ("model", MODEL)):
            pruner = JointPruner.from_pretrained(str(fits / name)).eval()
            (members,) = pruner.member_scores([evidence])
            rows.append({"unseen": unseen, "task": task, "seed": seed, "trust": float(trust(standardised(members)))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", required=True, type=Path)
    parser.add_argument("--glue", required=True, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    samples, _ = load([RESULTS / "joint_samples"])
    families = list(dict.fromkeys(family(sample.subject) for sample in samples))
    rows = []
    for unseen, name in [("task", name) for name in TASKS] + [("model", name) for name in families]:
        pruner = JointPruner.from_pretrained(str(options.fits / name)).eval()
        for sample in samples:
            known = task_of(sample.task) if unseen == "task" and sample.subject == MODEL else family(sample.subject)
            if known == name:
                rows.append({"unseen": unseen, "name": name, "sample": sample.subject, **row(pruner, sample)})
    result = {
        **provenance("OMP_NUM_THREADS=1 python benchmarks/trust.py --fits DIR --glue GLUE"),
        "rows": rows,
        "trust_on_texts": trust_on_texts(options.fits, options.glue),
    }
    write_text(RESULTS / "trust.json", json.dumps(result, indent=1) + "\n")
    columns = ["agreement", "loss of contribution", "loss of networks", "loss of score"]
    print("| unseen | samples | " + " | ".join(columns) + " |", "|---" * 6 + "|", sep="\n")
    for unseen, name in dict.fromkeys((one["unseen"], one["name"]) for one in rows):
        chosen = [one for one in rows if (one["unseen"], one["name"]) == (unseen, name)]
        means = " | ".join(f"{statistics.mean(one[column] for one in chosen):.2f}" for column in columns)
        print(f"| {unseen} {name} | {len(chosen)} | {means} |")
    for unseen in ("task", "model"):
        found = [one["trust"] for one in result["trust_on_texts"] if one["unseen"] == unseen]
        print(f"{unseen} unseen, {len(found)} draws of texts: trust from {min(found):.2f} to {max(found):.2f}")


if __name__ == "__main__":
    main()
