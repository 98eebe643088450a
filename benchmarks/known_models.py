"""What it is worth that the joint pruner remembers a model, part by part, before fine-tuning.

    python benchmarks/joint_pruner.py unseen --samples benchmarks/results/{joint,found}_samples \\
        --remembered benchmarks/results/deep_samples --out DIR
    python benchmarks/known_models.py recognise
    python benchmarks/known_models.py parts --glue GLUE --fits DIR [--jobs N]
    python benchmarks/known_models.py matching --glue GLUE --fits DIR [--jobs N]

DIR holds a fit without each task, which remembers no mask that was found for it. `parts`: heads are scored on as many
training texts as `prune` takes unless told, two draws, by the networks alone, by what is remembered alone, and by both
together, for single texts also with all samples counting alike; masks over the whole model are judged on 128 dev texts,
those of representations.py, by which it was decided how to remember. Writes results/known_models.json. `matching`: how
many of the two heads that match words most stay, on pairs, at either scope, and with more weight on matching. Writes
results/known_models_matching.json.
`recognise`: the mean correlation of the heads' fingerprints with the closest of all-MiniLM-L6-v2 and of rxnfp, for the
models of the fits and two that were fine-tuned from rxnfp. Writes results/known_models_recognised.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from secateur.units.values import HeadScores
from torch import Tensor

from joint_pruner import fingerprints
from provenance import provenance
from representations import JUDGED, LENGTH, RATIOS, TASKS
from secateur.choosing.mask_loss import MaskLoss
from secateur.comparing.workers import each, workers
from secateur.demo import CALIBRATION_TEXTS, demo_model
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.pruners.evidence import Evidence, contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner, matching_scores, standardised
from secateur.pruners.known_models import correlations
from secateur.pruners.tokens import special_ids_of
from secateur.sites.attention import find_sites
from secateur.support.files import write_text
from secateur.texts.data import Task, batches, load_task
from secateur.units.select import Scope, select_heads

RESULTS = Path(__file__).parent / "results"
DRAWS = (0, 1)
SCOPES: tuple[Scope, ...] = ("site", "global")
CONTRIBUTION, NETWORKS, ALONE, ALIKE, BOTH = (
    "contribution",
    "networks alone",
    "remembered alone",
    "both, all samples counting alike",
    "both (smp-plus)",
)
MORE = "both, matching=2"
SINGLE = ("sst2", "cola")
REMEMBERED = ("minilm", "rxnfp")
COMPARED = ("minilm", "rxnfp", "rxnfp-bert_ft", "rxnfp-bert_ft_10k_25s", "antiberty", "sapiens-heavy", "smollm2")


@torch.no_grad()
def draws_of(model: Any, tokenizer: Any, train: Task, pruner: JointPruner) -> list[tuple[Evidence, Tensor]]:
    """Return the evidence of each draw of texts, and what the members make of it."""
    found = []
    for draw in DRAWS:
        texts = train.head(CALIBRATION_TEXTS, seed=draw).texts
        made = forward_arguments(model, batches(tokenizer, texts, 32, LENGTH))
        special = special_ids_of(tokenizer) if train.is_pair else None
        evidence = gather_evidence(model, find_sites(model), made, train.is_pair, special_ids=special, maps=False)
        found.append((evidence, pruner.member_scores([evidence])[0]))
    return found


@torch.no_grad()
def parts_of(glue: Path, fits: Path, task: str) -> list[dict[str, Any]]:
    """Return a row for the mask of each part, ratio and draw on a task."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    train, dev = (load_task(glue / task, split) for split in ("train", "dev"))
    judged_by = forward_arguments(model, batches(tokenizer, dev.head(JUDGED, seed=0).texts, 32, LENGTH))
    loss = MaskLoss(model, judged_by, dev.is_pair)
    pruner = JointPruner.from_pretrained(str(fits / task)).eval()
    (known,) = pruner.known
    rows, seen = [], {}  # parts and draws often choose the same
    for draw, (evidence, judged) in enumerate(draws_of(model, tokenizer, train, pruner)):
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


@torch.no_grad()
def matching_of(glue: Path, fits: Path, task: str) -> list[dict[str, Any]]:
    """Return a row for each mask of a task of pairs: how many of the two heads that match most it keeps."""
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    pruner = JointPruner.from_pretrained(str(fits / task)).eval()
    known, weight, rows = pruner.known, pruner.matching, []
    for draw, (evidence, judged) in enumerate(draws_of(model, tokenizer, load_task(glue / task, "train"), pruner)):
        most = evidence.matching.topk(2).indices
        for name, pruner.known, pruner.matching in (
            (NETWORKS, torch.nn.ModuleList(), weight), (BOTH, known, weight), (MORE, known, 2.0)
        ):  # fmt: skip
            scores = HeadScores(evidence.split(pruner.combine(evidence, judged).double()))
            for scope, ratio in itertools.product(SCOPES, RATIOS):
                kept = torch.cat(list(select_heads(scores, ratio, scope).values()))[most]
                row = {"task": task, "scores": name, "scope": scope, "ratio": ratio, "draw": draw}
                rows.append({**row, "kept": int(kept.sum())})
    return rows


def write(name: str, command: str, rows: list[dict[str, Any]]) -> None:
    result = {
        **provenance(f"python benchmarks/known_models.py {command}"),
        "rows": rows,
    }
    write_text(RESULTS / name, json.dumps(result, indent=1) + "\n")


def measured(options: argparse.Namespace, measure: Callable[..., list[dict[str, Any]]], tasks: list[str]) -> list[Any]:
    with workers(options.jobs, 1, "cpu") as pool:
        calls = [(options.glue, options.fits, task) for task in tasks]
        rows = [row for found in each(pool, measure, calls, "tasks", True) for row in found]
    return sorted(rows, key=lambda row: tasks.index(row["task"]))


def parts(options: argparse.Namespace) -> None:
    rows = measured(options, parts_of, TASKS)
    write("known_models.json", "parts --glue GLUE --fits DIR", rows)
    print("| heads removed | scored by | " + " | ".join(TASKS) + " |", "|---" * (2 + len(TASKS)) + "|", sep="\n")
    for ratio, name in itertools.product(RATIOS, (CONTRIBUTION, NETWORKS, ALONE, ALIKE, BOTH)):
        cells = []
        for task in TASKS:
            kl = [1e3 * r["kl"] for r in rows if (r["task"], r["ratio"], r["scores"]) == (task, ratio, name)]
            cells.append(f"{statistics.mean(kl):.1f} ± {statistics.stdev(kl):.1f}")
        print(f"| {ratio:.0%} | {name} | " + " | ".join(cells) + " |")


def matching(options: argparse.Namespace) -> None:
    tasks = [task for task in TASKS if task not in SINGLE]
    rows = measured(options, matching_of, tasks)
    write("known_models_matching.json", "matching --glue GLUE --fits DIR", rows)
    print(
        "| heads removed | scope | scored by | " + " | ".join(tasks) + " |", "|---" * (3 + len(tasks)) + "|", sep="\n"
    )
    for ratio, scope, name in itertools.product(RATIOS, SCOPES, (NETWORKS, BOTH, MORE)):
        cell = (ratio, scope, name)
        own = [row for row in rows if (row["ratio"], row["scope"], row["scores"]) == cell]
        cells = [", ".join(str(row["kept"]) for row in own if row["task"] == task) for task in tasks]
        print(f"| {ratio:.0%} | {scope} | {name} | " + " | ".join(cells) + " |")


def recognise(options: argparse.Namespace) -> None:
    rows = []
    for known, other in itertools.product(REMEMBERED, COMPARED):
        alike = correlations(fingerprints(other), fingerprints(known)).amax(dim=1).mean()
        rows.append({"known": known, "model": other, "mean correlation of the closest heads": float(alike)})
        print(f"| {known} | {other} | {alike:.2f} |")
    write("known_models_recognised.json", "recognise", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("recognise").set_defaults(run=recognise)
    for name, command in (("parts", parts), ("matching", matching)):
        one = commands.add_parser(name)
        one.add_argument("--glue", required=True, type=Path)
        one.add_argument("--fits", required=True, type=Path)
        one.add_argument("--jobs", type=int, default=1)
        one.set_defaults(run=command)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
