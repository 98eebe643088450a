"""What refitting output projections saves of the text representations, before fine-tuning.

    python -m benchmarks.run reconstruction --data GLUE --fits FITS
    python -m benchmarks.run reconstruction_similarity --data GLUE --fits FITS
    python -m benchmarks.run reconstruction_models

As representations.py: heads of all-MiniLM-L6-v2 are scored on 96 training texts, and what is left of the model is
judged by its relational KL on 128 dev texts; but each mask also with the output projections refitted by `reconstruct_`,
on the same 96 training texts and on 512. smp-plus is fitted without the task. The second refits on single sentences of
STS-B, as embeddings are made of these, and takes the similarity on its test pairs. The third does as the first with
half of the heads of other models (subjects.py), ranked by `contribution`, judged on 128 inputs from the half of their
domain that nothing was fitted on. Prints 1000 times the relational KL.
"""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import time
from collections import defaultdict
from typing import Any

from benchmarks.measures.representations import similarity
from benchmarks.provenance import made
from benchmarks.runs import JUDGED, LENGTH, SCORED, Run, inputs, minilm, table
from benchmarks.subjects import ANTIBODY, SUBJECTS
from tqdm import tqdm

from secateur.choosing.mask_loss import MaskLoss
from secateur.demo import demo_task
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from secateur.units.select import Allocation, select

TEXTS = (0, SCORED, 512)  # that output projections are refitted on; 0: they stay
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "ranking")
SCORERS = ("contribution", "smp-plus")


def measure(run: Run, *, ratios: list[float]) -> None:
    """Add a row for each task, draw of texts, scorer, allocation, ratio and number of texts that there is none of."""
    done = {cell(row) for row in run.rows()}
    model, tokenizer = minilm()
    test = run.task("stsb", "test", need_labels=True)
    for ratio, seed, task in tqdm(list(itertools.product(ratios, run.seeds, run.tasks))):
        train, dev = run.task(task), run.task(task, "dev").head(JUDGED, seed=0)
        loss = MaskLoss(model, inputs(model, tokenizer, dev.texts), dev.is_pair)
        for scorer, allocation in itertools.product(SCORERS, ALLOCATIONS):
            about = {"task": task, "scorer": scorer, "allocation": allocation, "ratio": ratio, "seed": seed}
            missing = [texts for texts in TEXTS if cell({**about, "texts": texts}) not in done]
            if not missing:
                continue
            scores = score(
                model,
                train.head(SCORED, seed=seed).texts,
                scorer,
                tokenizer,
                reading=Reading(max_length=LENGTH, seed=seed, progress=False),
                **run.options(scorer, task),
            )
            mask = select(scores, ratio, allocation)
            for texts in missing:
                given = train.head(texts, seed=seed).texts if texts else []
                refitted, row = judge(model, tokenizer, mask, given, loss, LENGTH)
                if task == "stsb":
                    row["similarity"] = similarity(refitted, tokenizer, test, mask)
                run.add({**about, "texts": texts, **row})
    print(tasks_table(run.rows(), run.tasks))


def judge(
    model: Any, tokenizer: Any, mask: Mask, texts: list[Any], loss: MaskLoss, length: int
) -> tuple[Any, dict[str, Any]]:
    """Refit a copy of the model on texts, if any, and return it and a row that says what it loses by the mask."""
    loss.model = model
    kept = mask.present(find_sites(model))
    loss(kept)  # looks at the dense model once
    refitted, start, row = copy.deepcopy(model), time.perf_counter(), {}
    if texts:
        row["fitted_on"] = list(reconstruct_(refitted, mask, texts, tokenizer, reading=Reading(max_length=length)))
        row["seconds"] = time.perf_counter() - start
    loss.model = refitted
    row["kl"] = loss(kept)
    return refitted, row | made()


def of_sentences(run: Run) -> None:
    """Add a row for each scorer, allocation and number of single sentences that there is none of."""
    done = {(row["scorer"], row["allocation"], row["texts"]) for row in run.rows()}
    model, tokenizer = minilm()
    train, test = run.task("stsb"), run.task("stsb", "test", need_labels=True)
    scored = train.head(SCORED, seed=0).texts
    for scorer in SCORERS:
        options = run.options(scorer, "stsb")
        scores = score(
            model, scored, scorer, tokenizer, reading=Reading(max_length=LENGTH, seed=0, progress=False), **options
        )
        for allocation, texts in itertools.product(ALLOCATIONS, TEXTS):
            if (scorer, allocation, texts) in done:
                continue
            mask, refitted, losses = select(scores, 0.5, allocation), copy.deepcopy(model), None
            if texts:
                sentences = [sentence for pair in train.head(texts // 2, seed=0).texts for sentence in pair]
                losses = reconstruct_(refitted, mask, sentences, tokenizer, reading=Reading(max_length=LENGTH))
            row = {"scorer": scorer, "allocation": allocation, "ratio": 0.5, "texts": texts, "fitted_on": losses}
            row["similarity"] = similarity(refitted, tokenizer, test, mask)
            print(row)
            run.add(row | made())


def of_models(run: Run, *, models: list[str]) -> None:
    """Add a row for each model, allocation and number of texts that there is none of."""
    done = {(row["model"], row["allocation"], row["texts"]) for row in run.rows()}
    for name in models:
        subject = SUBJECTS[name]()
        own = list(subject.texts) or [text for part in demo_task() for text in part.texts][::2]
        random.Random(0).shuffle(own)
        length = ANTIBODY if name.startswith("sapiens") else LENGTH
        loss = MaskLoss(subject.model, subject.draw(JUDGED, 1), False)
        scores = score(
            subject.model, own[:SCORED], "contribution", subject.tokenizer, reading=Reading(max_length=length)
        )
        for allocation, texts in itertools.product(ALLOCATIONS, TEXTS):
            if (name, allocation, texts) not in done:
                mask = select(scores, 0.5, allocation)
                _, row = judge(subject.model, subject.tokenizer, mask, own[:texts], loss, length)
                run.add({"model": name, "allocation": allocation, "ratio": 0.5, "texts": texts, **row})
    found = {(row["model"], row["allocation"], row["texts"]): f"{1e3 * row['kl']:.1f}" for row in run.rows()}
    cells = [
        [name, allocation, *(found.get((name, allocation, texts), "") for texts in TEXTS)]
        for name, allocation in dict.fromkeys(key[:2] for key in found)
    ]
    print(table(["model", "allocation", *(f"{texts or 'no'} texts" for texts in TEXTS)], cells))


def cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "scorer", "allocation", "ratio", "seed", "texts"))


def tasks_table(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> str:
    """Return 1000 times the relational KL, mean ± spread over draws, and the similarity, as Markdown."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    alike: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        label = tuple(row[name] for name in ("ratio", "allocation", "scorer", "texts"))
        found[(*label, row["task"])].append(1e3 * row["kl"])
        if "similarity" in row:
            alike[label].append(row["similarity"])
    lines = []
    for ratio, allocation, scorer, texts in dict.fromkeys(key[:4] for key in sorted(found)):
        values = [found[ratio, allocation, scorer, texts, task] for task in tasks]
        if not all(values):
            continue
        cells = [f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in values]
        share = statistics.mean(
            statistics.mean(v) / statistics.mean(found[ratio, allocation, scorer, 0, task])
            for v, task in zip(values, tasks, strict=True)
        )
        kept = alike[ratio, allocation, scorer, texts]
        about = [f"{ratio:.0%}", allocation, scorer, texts or "nothing"]
        lines.append([*about, *cells, f"{share:.2f}", f"{statistics.mean(kept):.4f}" if kept else ""])
    columns = ["heads removed", "allocation", "scorer", "refitted on", *tasks, "beside none", "similarity"]
    return table(columns, lines)
