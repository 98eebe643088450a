"""What refitting output projections saves of the text representations, before fine-tuning.

    OMP_NUM_THREADS=1 python benchmarks/reconstruction.py tasks --glue GLUE --fits DIR [--ratios 0.5 …] [--draws 2]
    OMP_NUM_THREADS=1 python benchmarks/reconstruction.py similarity --glue GLUE --fits DIR
    OMP_NUM_THREADS=1 python benchmarks/reconstruction.py models [--subjects rxnfp …]

As representations.py: heads of all-MiniLM-L6-v2 are scored on 96 training texts, and what is left of the model is
judged by its relational KL on 128 dev texts; but each mask also with the output projections refitted by `reconstruct_`,
on the same 96 training texts and on 512. DIR holds a fit of smp-plus without each task (`joint_pruner.py unseen`).
`similarity` refits on single sentences of STS-B, as embeddings are made of these, and takes the similarity on its test
pairs. `models` does as `tasks` with half of the heads of other models (subjects.py), ranked by `contribution`, judged
on 128 inputs from the half of their domain that nothing was fitted on. Prints 1000 times the relational KL, and adds to
results/reconstruction.jsonl, …_similarity.jsonl and …_models.jsonl: start again to go on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from secateur.units.values import HeadMask
from tqdm import tqdm

from provenance import machine, today
from representations import JUDGED, LENGTH, SCORED, TASKS, similarity
from secateur.choosing.mask_loss import MaskLoss
from secateur.demo import demo_model, demo_task
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.score import score_heads
from secateur.support.files import append_line, read_lines
from secateur.support.versions import environment
from secateur.texts.data import batches, load_task
from secateur.units.select import Scope, select_heads
from subjects import ANTIBODY, SUBJECTS

RESULTS = Path(__file__).parent / "results"
ROWS, MODEL_ROWS = RESULTS / "reconstruction.jsonl", RESULTS / "reconstruction_models.jsonl"
SIMILARITY_ROWS = RESULTS / "reconstruction_similarity.jsonl"
TEXTS = (0, SCORED, 512)  # that output projections are refitted on; 0: they stay
SCOPES: tuple[Scope, ...] = ("site", "global")
SCORERS = ("contribution", "smp-plus")
MODELS = ("rxnfp", "smollm2", "sapiens-heavy", "sapiens-light")


def measure(glue: Path, fits: Path, ratios: list[float], draws: int) -> None:
    """Add a row for each task, draw of texts, scorer, scope, ratio and number of texts that there is none of."""
    done = {cell(row) for row in read_lines(ROWS)}
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    test = load_task(glue / "stsb", "test", need_labels=True)
    for ratio, seed, task in tqdm(list(itertools.product(ratios, range(draws), TASKS))):
        train, dev = load_task(glue / task, "train"), load_task(glue / task, "dev").head(JUDGED, seed=0)
        loss = MaskLoss(model, forward_arguments(model, batches(tokenizer, dev.texts, 32, LENGTH)), dev.is_pair)
        for scorer, scope in itertools.product(SCORERS, SCOPES):
            about = {"task": task, "scorer": scorer, "scope": scope, "ratio": ratio, "seed": seed}
            missing = [texts for texts in TEXTS if cell({**about, "texts": texts}) not in done]
            if not missing:
                continue
            pruner = {"pruner": str(fits / task)} if scorer == "smp-plus" else {}
            scored = train.head(SCORED, seed=seed).texts
            scores = score_heads(
                model, scored, scorer, tokenizer, max_length=LENGTH, seed=seed, progress=False, **pruner
            )
            mask = select_heads(scores, ratio, scope)
            for texts in missing:
                given = train.head(texts, seed=seed).texts if texts else []
                refitted, row = judge(model, tokenizer, mask, given, loss, LENGTH)
                if task == "stsb":
                    row["similarity"] = similarity(refitted, tokenizer, test, mask)
                append_line(ROWS, {**about, "texts": texts, **row})


def judge(
    model: Any, tokenizer: Any, mask: HeadMask, texts: list[Any], loss: MaskLoss, length: int
) -> tuple[Any, dict[str, Any]]:
    """Refit a copy of the model on texts, if any, and return it and a row that says what it loses by the mask."""
    loss.model = model
    loss(mask)  # looks at the dense model once
    refitted, start, row = copy.deepcopy(model), time.perf_counter(), {}
    if texts:
        row["fitted_on"] = list(reconstruct_(refitted, mask, texts, tokenizer, max_length=length))
        row["seconds"] = time.perf_counter() - start
    loss.model = refitted
    row["kl"] = loss(mask)
    return refitted, row | made()


def made() -> dict[str, Any]:
    """Return when, where and with what a row was measured."""
    return {"date": today(), "machine": machine(), "environment": environment()}


def measure_similarity(glue: Path, fits: Path) -> None:
    """Add a row for each scorer, scope and number of single sentences that there is none of."""
    done = {(row["scorer"], row["scope"], row["texts"]) for row in read_lines(SIMILARITY_ROWS)}
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    train, test = load_task(glue / "stsb", "train"), load_task(glue / "stsb", "test", need_labels=True)
    scored = train.head(SCORED, seed=0).texts
    for scorer in SCORERS:
        pruner = {"pruner": str(fits / "stsb")} if scorer == "smp-plus" else {}
        scores = score_heads(model, scored, scorer, tokenizer, max_length=LENGTH, seed=0, progress=False, **pruner)
        for scope, texts in itertools.product(SCOPES, TEXTS):
            if (scorer, scope, texts) in done:
                continue
            mask, refitted, losses = select_heads(scores, 0.5, scope), copy.deepcopy(model), None
            if texts:
                sentences = [sentence for pair in train.head(texts // 2, seed=0).texts for sentence in pair]
                losses = reconstruct_(refitted, mask, sentences, tokenizer, max_length=LENGTH)
            row = {"scorer": scorer, "scope": scope, "ratio": 0.5, "texts": texts, "fitted_on": losses}
            row["similarity"] = similarity(refitted, tokenizer, test, mask)
            print(row)
            append_line(SIMILARITY_ROWS, row | made())


def measure_models(names: list[str]) -> None:
    """Add a row for each model, scope and number of texts that there is none of."""
    done = {(row["model"], row["scope"], row["texts"]) for row in read_lines(MODEL_ROWS)}
    for name in names:
        subject = SUBJECTS[name]()
        own = list(subject.texts) or [text for part in demo_task() for text in part.texts][::2]
        random.Random(0).shuffle(own)
        length = ANTIBODY if name.startswith("sapiens") else LENGTH
        loss = MaskLoss(subject.model, subject.draw(JUDGED, 1), False)
        scores = score_heads(subject.model, own[:SCORED], "contribution", subject.tokenizer, max_length=length)
        for scope, texts in itertools.product(SCOPES, TEXTS):
            if (name, scope, texts) not in done:
                mask = select_heads(scores, 0.5, scope)
                _, row = judge(subject.model, subject.tokenizer, mask, own[:texts], loss, length)
                append_line(MODEL_ROWS, {"model": name, "scope": scope, "ratio": 0.5, "texts": texts, **row})


def models_table() -> str:
    """Return 1000 times the relational KL by model, scope and number of texts, as Markdown."""
    found = {(row["model"], row["scope"], row["texts"]): 1e3 * row["kl"] for row in read_lines(MODEL_ROWS)}
    lines = ["| model | scope | " + " | ".join(f"{texts or 'no'} texts" for texts in TEXTS) + " |", "|---" * 5 + "|"]
    for name, scope in dict.fromkeys(key[:2] for key in found):
        values = [found.get((name, scope, texts)) for texts in TEXTS]
        lines.append(f"| {name} | {scope} | " + " | ".join("" if v is None else f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "scorer", "scope", "ratio", "seed", "texts"))


def table() -> str:
    """Return 1000 times the relational KL, mean ± spread over draws, and the similarity, as Markdown."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    alike: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in read_lines(ROWS):
        label = tuple(row[name] for name in ("ratio", "scope", "scorer", "texts"))
        found[(*label, row["task"])].append(1e3 * row["kl"])
        if "similarity" in row:
            alike[label].append(row["similarity"])
    lines = ["| heads removed | scope | scorer | refitted on | " + " | ".join(TASKS) + " | beside none | similarity |"]
    lines.append("|---" * (6 + len(TASKS)) + "|")
    for ratio, scope, scorer, texts in dict.fromkeys(key[:4] for key in sorted(found)):
        values = [found[ratio, scope, scorer, texts, task] for task in TASKS]
        if not all(values):
            continue
        cells = [f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in values]
        share = statistics.mean(
            statistics.mean(v) / statistics.mean(found[ratio, scope, scorer, 0, task])
            for v, task in zip(values, TASKS, strict=True)
        )
        kept = statistics.mean(alike[ratio, scope, scorer, texts])
        lines.append(
            f"| {ratio:.0%} | {scope} | {scorer} | {texts or 'nothing'} | "
            + " | ".join(cells)
            + f" | {share:.2f} | {kept:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tasks", "similarity", "models"))
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--fits", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.75])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--subjects", nargs="+", default=MODELS, choices=SUBJECTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if options.what == "models":
        measure_models(options.subjects)
        print(models_table())
    elif options.what == "similarity":
        measure_similarity(options.glue, options.fits)
    else:
        measure(options.glue, options.fits, options.ratios, options.draws)
        print(table())


if __name__ == "__main__":
    main()
