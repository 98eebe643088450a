"""What it saves that texts of like length share a batch: padded tokens, and the time of scoring.

    OMP_NUM_THREADS=1 python benchmarks/like_lengths.py --glue GLUE [--rounds 5]

256 training texts of each task (GLUE: a folder with one folder a task), 32 a batch, at most 128 tokens, MiniLM. Tokens
are those that the model computes for each that is no padding. `contribution` scores the texts in the order given, as
ready batches, and as a list, which sorts them by length, in turn; CPU time of one thread. Writes
results/like_lengths.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from provenance import provenance
from secateur.demo import demo_model
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers.score import score_heads
from secateur.support.files import write_text
from secateur.texts.calibration import by_length
from secateur.texts.data import batches, load_task

TASKS = ("cola", "sst2", "stsb", "mrpc", "qqp", "mnli", "rte", "qnli")
TEXTS, BATCH, LENGTH = 256, 32, 128


def padded(made: list[dict[str, torch.Tensor]]) -> float:
    """Return how many tokens are computed for each real one."""
    return sum(b["input_ids"].numel() for b in made) / sum(int(b["attention_mask"].sum()) for b in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    rows: list[dict[str, Any]] = []
    for name in TASKS:
        texts = load_task(given.glue / name, "train").head(TEXTS, seed=0).texts
        as_given = batches(tokenizer, texts, BATCH, LENGTH)
        options = {"tokenizer": tokenizer, "batch_size": BATCH, "max_length": LENGTH}
        ratios = []
        for number in range(given.rounds + 1):
            start = time.process_time()
            first = score_heads(model, texts, "contribution", **options)
            middle = time.process_time()
            second = score_heads(model, None, "contribution", tokenizer, inputs=as_given)
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
    result = {
        **provenance(
            "OMP_NUM_THREADS=1 python benchmarks/like_lengths.py --glue GLUE", "other work beside it; CPU time"
        ),
        "rows": rows,
    }
    write_text(Path(__file__).parent / "results" / "like_lengths.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
