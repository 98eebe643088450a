"""What the joint meta-pruner may see if what it learns shall hold for models that it has not seen.

    OMP_NUM_THREADS=1 python benchmarks/unseen_models.py [--seeds 0 1 2] [--families minilm rxnfp digits sapiens]

The pruner is fitted on results/joint_samples without a family of models, seeing all kinds of evidence but for some, and
held against the trials of that family: the trial loss (0: the scores explain which masks are good, 1: they say nothing,
2: the wrong way), mean over scopes, ratios and samples. The contribution's own is printed beside it. No model is
needed. Writes results/unseen_models.json after every fit; what the file has already is not fitted again.
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
from tqdm import tqdm

from joint_pruner import fitted, load
from secateur.files import read_json, write_text
from secateur.meta.joint import contribution_scores
from secateur.meta.joint_training import Sample, trial_loss
from secateur.versions import environment

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "unseen_models.json"
CONTRIBUTION = "no fit: the contribution"
VARIANTS = {
    "everything": (),
    "all but place": ("place",),
    "all but maps": ("maps",),
    "all but maps and place (what ships)": ("maps", "place"),
    "sizes and redundancy": ("maps", "place", "direction"),
    "sizes alone": ("maps", "place", "direction", "redundancy"),
}


def mean_loss(scores: list[torch.Tensor], samples: list[Sample]) -> float:
    return statistics.mean(float(trial_loss(row.float(), one)) for row, one in zip(scores, samples, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=["minilm", "rxnfp", "digits", "sapiens"])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    rows = read_json(OUT)["rows"] if OUT.is_file() else []
    done = {(row["family"], row["seed"], row["fitted_with"]) for row in rows}
    cells = [(seed, family, name) for seed in options.seeds for family in options.families for name in VARIANTS]
    for seed, family, name in tqdm([cell for cell in cells if (cell[1], cell[0], cell[2]) not in done], desc="fits"):
        kept, left_out = load(RESULTS / "joint_samples", families=(family,))
        if (family, 0, CONTRIBUTION) not in done:
            loss = mean_loss([contribution_scores(one.evidence) for one in left_out], left_out)
            rows.append({"family": family, "seed": 0, "fitted_with": CONTRIBUTION, "trial_loss": loss})
            done.add((family, 0, CONTRIBUTION))
        pruner = fitted(kept, seed, without=VARIANTS[name])
        with torch.no_grad():
            loss = mean_loss(pruner.score_all([one.evidence for one in left_out]), left_out)
        rows.append({"family": family, "seed": seed, "fitted_with": name, "trial_loss": loss})
        result = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/unseen_models.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, one thread of 2 cores, no GPU",
            "versions": environment(),
            "rows": rows,
        }
        write_text(OUT, json.dumps(result, indent=1) + "\n")
    print("| fitted with |", " | ".join(f"{family} unseen" for family in options.families), "|")
    print("|---" * (1 + len(options.families)) + "|")
    for name in (CONTRIBUTION, *VARIANTS):
        shown = []
        for family in options.families:
            found = [row["trial_loss"] for row in rows if (row["family"], row["fitted_with"]) == (family, name)]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            shown.append(f"{statistics.mean(found):.2f}{spread}" if found else "")
        print(f"| {name} |", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
