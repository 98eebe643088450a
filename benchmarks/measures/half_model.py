"""Half of a sentence encoder, a third, a quarter: what is left of its embeddings, never fine-tuned, and what that took.

    python -m benchmarks.run half_model --data GLUE

all-MiniLM-L6-v2 is pruned by `prune` alone on up to 50,000 single sentences of the GLUE training files, without labels:
by its defaults, with the same share at every site, with whole layers instead, and without the restoring steps. Judged
by the Spearman correlation of cosines with the scores of STS-B's test pairs, of which nothing is read before, as a
share of the dense model's; and by what `prune` itself says, on sentences that it holds out.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from benchmarks.embeddings import embeddings
from benchmarks.runs import Run, minilm
from scipy.stats import spearmanr

from secateur.pruning import prune
from secateur.settings import Reading
from secateur.texts.data import Task

MOST_TEXTS, FROM_EACH, SCORED = 50_000, 8_000, 1_024

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"allocation": "uniform", "restore": "distill"},
    "layers": {"allocation": "uniform", "restore": "distill", "units": ["layers"], "scorer": "block_influence"},
    "not restored": {"allocation": "sensitivity", "restore": "none"},
    "reconstructed": {"allocation": "sensitivity", "restore": "reconstruct"},
}
"""What is handed to `prune` beside the budget."""


def measure(run: Run, *, cells: list[list[Any]]) -> None:
    """Add a row for each way, budget and number of steps in `cells`, and each seed, that there is none of."""
    test = run.task("stsb", "test", need_labels=True)
    done = {(row["way"], row["budget"], row["steps"], row["seed"]) for row in run.rows()}
    dense = None
    for seed in run.seeds:
        for way, budget, steps in cells:
            if (way, budget, steps, seed) in done:
                continue
            model, tokenizer = minilm()
            dense = similarity(model, tokenizer, test) if dense is None else dense
            start, spent = time.perf_counter(), time.process_time()
            smaller, report = prune(
                model, sentences(run, seed), budget=budget, steps=steps, tokenizer=tokenizer,
                reading=Reading(seed=seed, stop=SCORED), **{"scorer": "contribution"} | WAYS[way],
            )  # fmt: skip
            seconds, processor = time.perf_counter() - start, time.process_time() - spent
            left = similarity(smaller, tokenizer, test)
            run.add(
                {
                    "way": way,
                    "budget": budget,
                    "steps": steps,
                    "seed": seed,
                    "spearman": round(left, 4),
                    "dense": round(dense, 4),
                    "retention": round(left / dense, 4),
                    "macs": round(report.after.macs / report.before.macs, 4),
                    "quality": None if report.quality is None else report.quality.to_json(),
                    "kept": {name: len(kept) for name, kept in report.mask.kept.items()},
                    "seconds": round(seconds),
                    "processor_seconds": round(processor),
                }
            )


def sentences(run: Run, seed: int) -> list[str]:
    """Return single sentences of the GLUE training files, as many of each at most, shuffled by the seed."""
    found: list[str] = []
    for task in run.tasks:
        texts = [one for text in run.task(task).texts for one in ([text] if isinstance(text, str) else text)]
        found += random.Random(seed).sample(texts, min(len(texts), FROM_EACH))
    unique = list(dict.fromkeys(found))
    random.Random(seed).shuffle(unique)
    return unique[:MOST_TEXTS]


def similarity(model: Any, tokenizer: Any, test: Task) -> float:
    """Return the Spearman correlation of the cosines of embeddings with the scores of the pairs."""
    pairs = [tuple(text) for text in test.texts]
    one, other = (embeddings(model.eval(), tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    return float(spearmanr(torch.cosine_similarity(one, other, dim=1).numpy(), test.labels).statistic)
