"""What it is worth that the joint pruner remembers a model: before fine-tuning, part by part, and after it.

    python benchmarks/joint_pruner.py unseen --samples benchmarks/results/{joint,found}_samples \\
        --remembered benchmarks/results/deep_samples --out DIR
    python benchmarks/known_models.py recognise
    python benchmarks/known_models.py parts --glue GLUE --fits DIR [--jobs N]
    OMP_NUM_THREADS=1 python benchmarks/known_models.py finetune --glue GLUE --fits DIR [--jobs N]

DIR holds a fit without each task, which remembers no mask that was found for it. `parts`: heads are scored on as many
training texts as `prune` takes unless told, two draws, by the networks alone, by what is remembered alone, and by both
together, for single texts also with all samples counting alike; masks over the whole model are judged on 128 dev texts,
those of representations.py, by which it was decided how to remember. Writes results/known_models.json. `finetune`: half
of the heads gone, by layer and over the whole model, the texts, training and seeds of results/rivals.jsonl; a mask that
is there is not trained again. Writes results/known_models_finetuning.jsonl after every run, and goes on from there.
`recognise`: the mean correlation of the heads' fingerprints with the closest of all-MiniLM-L6-v2 and of rxnfp, for the
models of the fits and two that were fine-tuned from rxnfp. Writes results/known_models_recognised.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from finetuning_runs import SCORED, finetune_mask, key, score_texts
from joint_pruner import fingerprints
from representations import JUDGED, LENGTH, RATIOS, TASKS
from secateur.data import batches, load_task
from secateur.demo import CALIBRATION_TEXTS, demo_model
from secateur.files import append_line, read_lines, write_text
from secateur.heads import HeadScores
from secateur.meta.evidence import contribution_scores, gather_evidence
from secateur.meta.joint import JointPruner, matching_scores, standardised
from secateur.meta.known_models import correlations
from secateur.meta.search import MaskLoss
from secateur.model.inputs import forward_arguments
from secateur.model.loading import load_model, load_tokenizer
from secateur.model.sites import find_sites
from secateur.scorers.base import special_ids_of
from secateur.selection import Scope, select_heads
from secateur.versions import environment
from secateur.workers import each, workers

RESULTS = Path(__file__).parent / "results"
TUNED = RESULTS / "known_models_finetuning.jsonl"
DRAWS, SEEDS = (0, 1), (0, 1, 2)
SCOPES: tuple[Scope, ...] = ("site", "global")
CONTRIBUTION, NETWORKS, ALONE, ALIKE, BOTH = (
    "contribution",
    "networks alone",
    "remembered alone",
    "both, all samples counting alike",
    "both (smp-plus)",
)
REMEMBERED = ("minilm", "rxnfp")
COMPARED = ("minilm", "rxnfp", "rxnfp-bert_ft", "rxnfp-bert_ft_10k_25s", "antiberty", "sapiens-heavy", "smollm2")
FINETUNED = ("sst2", "stsb", "qqp", "mrpc")


@torch.no_grad()
def parts_of(glue: Path, fits: Path, task: str) -> list[dict[str, Any]]:
    """Return a row for the mask of each part, ratio and draw on a task."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    train, dev = (load_task(glue / task, split) for split in ("train", "dev"))

    def made(texts: list[Any]) -> list[Any]:
        return forward_arguments(model, batches(tokenizer, texts, 32, LENGTH))

    loss = MaskLoss(model, made(dev.head(JUDGED, seed=0).texts), dev.is_pair)
    pruner = JointPruner.from_pretrained(str(fits / task)).eval()
    (known,) = pruner.known
    rows, seen = [], {}  # parts and draws often choose the same
    for draw in DRAWS:
        texts = made(train.head(CALIBRATION_TEXTS, seed=draw).texts)
        special = special_ids_of(tokenizer) if dev.is_pair else None
        evidence = gather_evidence(model, find_sites(model), texts, dev.is_pair, special_ids=special, maps=False)
        (judged,) = pruner.judge_all([evidence])
        matched = pruner.matching * matching_scores(evidence)
        networks = standardised(standardised(judged).mean(dim=0))
        alike = standardised(known.kept[known.pairs == dev.is_pair].mean(dim=0))
        scores = {
            CONTRIBUTION: contribution_scores(evidence),
            NETWORKS: networks + matched,
            ALONE: standardised(pruner.recall(evidence)) + matched,
            ALIKE: (networks + alike) / 2 + matched,
            BOTH: pruner.combine(evidence, judged),
        }
        for (name, one), ratio in itertools.product(scores.items(), RATIOS):
            mask = select_heads(HeadScores(evidence.split(one.double())), ratio, "global")
            of = json.dumps(mask.to_json())
            if of not in seen:
                seen[of] = loss(mask)
            rows.append({"task": task, "scores": name, "ratio": ratio, "draw": draw, "kl": seen[of]})
    return rows


def parts(options: argparse.Namespace) -> None:
    with workers(options.jobs, 1, "cpu") as pool:
        calls = [(options.glue, options.fits, task) for task in TASKS]
        rows = [row for found in each(pool, parts_of, calls, "judging", True) for row in found]
    rows.sort(key=lambda row: TASKS.index(row["task"]))
    result = {
        "command": "python benchmarks/known_models.py parts --glue GLUE --fits DIR",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 2 cores, no GPU",
        "versions": environment(),
        "rows": rows,
    }
    write_text(RESULTS / "known_models.json", json.dumps(result, indent=1) + "\n")
    print("| heads removed | scored by | " + " | ".join(TASKS) + " |", "|---" * (2 + len(TASKS)) + "|", sep="\n")
    for ratio, name in itertools.product(RATIOS, (CONTRIBUTION, NETWORKS, ALONE, ALIKE, BOTH)):
        cells = []
        for task in TASKS:
            kl = [1e3 * r["kl"] for r in rows if (r["task"], r["ratio"], r["scores"]) == (task, ratio, name)]
            cells.append(f"{statistics.mean(kl):.1f} ± {statistics.stdev(kl):.1f}")
        print(f"| {ratio:.0%} | {name} | " + " | ".join(cells) + " |")


@torch.no_grad()
def choose(glue: Path, fits: Path) -> list[dict[str, Any]]:
    """Return the masks to fine-tune, by the networks alone and together with what is remembered."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    rows = []
    for task, seed, name in itertools.product(FINETUNED, SEEDS, (NETWORKS, BOTH)):
        pruner = JointPruner.from_pretrained(str(fits / task))
        if name == NETWORKS:
            pruner.known = torch.nn.ModuleList()
        texts = load_task(glue / task, "train").head(SCORED, seed=seed).texts
        scores = score_texts(model, tokenizer, texts, "smp-plus", seed, pruner=pruner)
        for scope in SCOPES:
            kept = select_heads(scores, 0.5, scope).kept_heads
            rows.append({"task": task, "scores": name, "scope": scope, "seed": seed, "kept_heads": kept})
    return sorted(rows, key=lambda row: SCOPES.index(row["scope"]))


def finetune(options: argparse.Namespace) -> None:
    rivals = read_lines(RESULTS / "rivals.jsonl")
    dense = {(row["task"], row["seed"]): row["value"] for row in rivals if not row["kept_heads"]}
    there = {key(row): {"value": row["value"], "as_in": "rivals.jsonl"} for row in rivals if row["kept_heads"]}
    rows = choose(options.glue, options.fits)
    there |= {key(row): row for row in read_lines(TUNED) if "as_in" not in row}
    runs = {key(row): (options.glue, row["task"], row["seed"], row["kept_heads"]) for row in rows}
    with workers(options.jobs, 1, "cpu") as pool:
        missing = [call for name, call in runs.items() if name not in there]
        for run in each(pool, finetune_mask, missing, "fine-tuning", True):
            append_line(TUNED, run)
            there[key(run)] = run
    found = [{**row, **there[key(row)], "scores": row["scores"], "scope": row["scope"]} for row in rows]
    write_text(TUNED, "".join(json.dumps(row) + "\n" for row in found))
    print("| scope | scored by | " + " | ".join(FINETUNED) + " | kept |", "|---" * (3 + len(FINETUNED)) + "|", sep="\n")
    for scope, name in itertools.product(SCOPES, (NETWORKS, BOTH)):
        own = [row for row in found if (row["scope"], row["scores"]) == (scope, name)]
        cells = []
        for task in FINETUNED:
            values = [row["value"] for row in own if row["task"] == task]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        kept = statistics.mean(row["value"] / dense[row["task"], row["seed"]] for row in own)
        print(f"| {scope} | {name} | " + " | ".join(cells) + f" | {kept:.1%} |")


def recognise(options: argparse.Namespace) -> None:
    rows = []
    for known, other in itertools.product(REMEMBERED, COMPARED):
        alike = correlations(fingerprints(other), fingerprints(known)).amax(dim=1).mean()
        rows.append({"known": known, "model": other, "mean correlation of the closest heads": float(alike)})
        print(f"| {known} | {other} | {alike:.2f} |")
    result = {"command": "python benchmarks/known_models.py recognise", "versions": environment(), "rows": rows}
    write_text(RESULTS / "known_models_recognised.json", json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("recognise").set_defaults(run=recognise)
    for name, command in (("parts", parts), ("finetune", finetune)):
        one = commands.add_parser(name)
        one.add_argument("--glue", required=True, type=Path)
        one.add_argument("--fits", required=True, type=Path)
        one.add_argument("--jobs", type=int, default=1)
        one.set_defaults(run=command)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
