"""What it saves that texts of like length share a batch: padded tokens, and the time of scoring.

256 training texts of each task, 32 a batch, at most 128 tokens, MiniLM. Tokens are those that the model computes for
each that is no padding. `contribution` scores the texts in the order given, as ready batches, and as a list, which
sorts them by length, in turn; CPU time.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from benchmarks.runs import Run, minilm

from secateur.scorers.score import score
from secateur.texts.sources import by_length
from secateur.texts.tokenization import batches

TEXTS, BATCH, LENGTH = 256, 32, 128


def padded(made: list[dict[str, torch.Tensor]]) -> float:
    """Return how many tokens are computed for each real one."""
    return sum(b["input_ids"].numel() for b in made) / sum(int(b["attention_mask"].sum()) for b in made)


def measure(run: Run, *, rounds: int) -> None:
    model, tokenizer = minilm()
    rows: list[dict[str, Any]] = []
    for name in run.tasks:
        texts = run.texts(name, TEXTS)
        as_given = batches(tokenizer, texts, BATCH, LENGTH)
        options = {"tokenizer": tokenizer, "batch_size": BATCH, "max_length": LENGTH}
        ratios = []
        for number in range(rounds + 1):
            start = time.process_time()
            first = score(model, texts, "contribution", **options)
            middle = time.process_time()
            second = score(model, None, "contribution", tokenizer, inputs=as_given)
            if number:  # the first round warms up
                ratios.append((time.process_time() - middle) / (middle - start))
        rows.append(
            {
                "task": name,
                "tokens_as_given": padded(as_given),
                "tokens_by_length": padded(batches(tokenizer, by_length(texts), BATCH, LENGTH)),
                "time_ratios": ratios,
                "largest_difference": max(float((first[site] - second[site]).abs().max()) for site in first),
            }
        )
        print(
            f"{name}: {rows[-1]['tokens_as_given']:.2f} and {rows[-1]['tokens_by_length']:.2f} tokens for a real one, "
            f"{statistics.median(ratios):.2f} times faster (from {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    run.write(rows=rows)
