"""Half of a sentence encoder, a third, a quarter: what is left of its embeddings, never fine-tuned, and what that took.

    python -m benchmarks.run half_model --data GLUE

all-MiniLM-L6-v2 is pruned by `prune` alone on up to 50,000 single sentences of the GLUE training files, without labels:
by need and by contribution, with the heads that match words, with the same share at every site, with whole layers
instead, and without the restoring steps. Judged on texts that are not read before: by the Spearman correlation of
cosines with the scores of STS-B's test pairs, as a share of the dense model's; by whether an index stays valid, as
recall@10 of a question's duplicate for the duplicates of QQP's dev pairs among these and 10,000 other questions, the
questions asked and the index embedded by either model; and by what `prune` itself says, on sentences that it holds out.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.embeddings import embeddings
from benchmarks.provenance import made
from benchmarks.runs import Run, minilm
from scipy.stats import spearmanr

from secateur.pruning import prune
from secateur.settings import Cut, Reading
from secateur.texts.data import Task

MOST_TEXTS, FROM_EACH, SCORED, OTHERS = 50_000, 8_000, 1_024, 10_000

SAME_SHARE, BY_NEED = Cut(allocation="uniform"), Cut(allocation="sensitivity")
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "matching heads": {"scorer": "matching"},
    "uniform": {"cut": SAME_SHARE, "restore": "distill"},
    "layers": {"cut": Cut(allocation="uniform", units=["layers"]), "restore": "distill", "scorer": "block_influence"},
    "not restored": {"cut": BY_NEED, "restore": "none"},
    "reconstructed": {"cut": BY_NEED, "restore": "reconstruct"},
}
"""What is handed to `prune` beside the budget."""


def measure(run: Run, *, cells: list[list[Any]], keep: list[str]) -> None:
    """Add a row for each way, budget and number of steps in `cells`, and each seed, that there is none of.

    What the ways in `keep` give stays in the folder for long runs: `int8_quality` goes on with it.
    """
    done = {(row["way"], row["budget"], row["steps"], row["seed"]) for row in run.rows()}
    judge = None
    for seed in run.seeds:
        for way, budget, steps in cells:
            if (way, budget, steps, seed) in done:
                continue
            model, tokenizer = minilm()
            judge = Judge(run, model, tokenizer) if judge is None else judge
            start, spent = time.perf_counter(), time.process_time()
            smaller, report = prune(
                model, sentences(run, seed), budget=budget, steps=steps, tokenizer=tokenizer,
                reading=Reading(seed=seed, stop=SCORED), **{"scorer": "contribution"} | WAYS[way],
            )  # fmt: skip
            seconds, processor = time.perf_counter() - start, time.process_time() - spent
            if way in keep:
                smaller.save_pretrained(place_of(run.work, way, budget, steps, seed))
            run.add(
                {
                    "way": way,
                    "budget": budget,
                    "steps": steps,
                    "seed": seed,
                    **judge(smaller),
                    "macs": round(report.after.macs / report.before.macs, 4),
                    "quality": None if report.quality is None else report.quality.to_json(),
                    "kept": {name: len(kept) for name, kept in report.mask.kept.items()},
                    "seconds": round(seconds),
                    "processor_seconds": round(processor),
                    **made(run.note),
                }
            )


def place_of(work: Path, *cell: Any) -> Path:
    """Return the folder of the model of a way, budget, number of steps and seed."""
    return work / "-".join(map(str, cell))


def sentences(run: Run, seed: int) -> list[str]:
    """Return single sentences of the GLUE training files, as many of each at most, shuffled by the seed."""
    found: list[str] = []
    for task in run.tasks:
        texts = [one for text in run.task(task).texts for one in ([text] if isinstance(text, str) else text)]
        found += random.Random(seed).sample(texts, min(len(texts), FROM_EACH))
    unique = list(dict.fromkeys(found))
    random.Random(seed).shuffle(unique)
    return unique[:MOST_TEXTS]


class Judge:
    """Compares a smaller model with the dense one on texts that neither was made with."""

    def __init__(self, run: Run, dense: Any, tokenizer: Any) -> None:
        self.tokenizer, self.test = tokenizer, run.task("stsb", "test", need_labels=True)
        pairs = run.task("qqp", "dev", need_labels=True)
        same = [text for text, label in zip(pairs.texts, pairs.labels, strict=True) if int(label) == 1]
        others = [question for text in [*pairs.texts, *run.task("qqp").texts] for question in text]
        self.asked = [text[0] for text in same]
        self.index = list(dict.fromkeys([*(text[1] for text in same), *others[:OTHERS]]))
        self.index_of = {text: number for number, text in enumerate(self.index)}
        self.places = [self.index_of[text[1]] for text in same]
        self.spearman = similarity(dense, tokenizer, self.test)
        self.queries, self.documents = (embeddings(dense.eval(), tokenizer, one) for one in (self.asked, self.index))
        self.recall = self.recall_of(self.queries, self.documents)

    def __call__(self, smaller: Any) -> dict[str, float]:
        """Return what is left of both measures."""
        left = similarity(smaller, self.tokenizer, self.test)
        queries, documents = (embeddings(smaller, self.tokenizer, one) for one in (self.asked, self.index))
        found = {
            "spearman": left,
            "dense": self.spearman,
            "retention": left / self.spearman,
            "recall_dense": self.recall,
            "recall_small": self.recall_of(queries, documents),
            "recall_small_on_dense_index": self.recall_of(queries, self.documents),
        }
        return {name: round(value, 4) for name, value in found.items()} | {"index": len(self.index)}

    def recall_of(self, queries: torch.Tensor, documents: torch.Tensor, among: int = 10) -> float:
        """Return how often a question's duplicate is among its nearest by cosine, itself left out."""
        near = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(documents, dim=1).T
        for row, question in zip(near, self.asked, strict=True):
            if question in self.index_of:
                row[self.index_of[question]] = -1
        found = near.topk(among, dim=1).indices
        return sum(place in row for place, row in zip(self.places, found.tolist(), strict=True)) / len(self.places)


def similarity(model: Any, tokenizer: Any, test: Task) -> float:
    """Return the Spearman correlation of the cosines of embeddings with the scores of the pairs."""
    pairs = [tuple(text) for text in test.texts]
    one, other = (embeddings(model.eval(), tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    return float(spearmanr(torch.cosine_similarity(one, other, dim=1).numpy(), test.labels).statistic)
