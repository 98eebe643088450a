"""What distillation without labels saves of the text representations, before fine-tuning.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py tasks --glue GLUE --fits DIR [--scopes global site]
    OMP_NUM_THREADS=1 python benchmarks/distillation.py similarity --glue GLUE --fits DIR

As reconstruction.py, whose masks these are: half of the heads of all-MiniLM-L6-v2 go, by smp-plus fitted without the
task, and the relational KL is of 128 dev texts; but then the dense model teaches the pruned one on the texts of the
train split, as `secateur compare --distill 300 --bf16` does. `similarity` teaches on the single sentences of STS-B and
takes the similarity on its test pairs. Adds rows to results/distillation.jsonl: start again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reconstruction import made
from representations import JUDGED, LENGTH, SCORED, TASKS, similarity
from secateur.choosing.mask_loss import MaskLoss
from secateur.demo import demo_model
from secateur.models.inputs import forward_arguments
from secateur.models.loading import load_model, load_tokenizer
from secateur.removal.remove import remove_heads_
from secateur.restoring.distillation import distill_
from secateur.scorers.score import score_heads
from secateur.support.files import append_line, read_lines
from secateur.texts.data import batches, load_task
from secateur.units.select import select_heads

ROWS = Path(__file__).parent / "results" / "distillation.jsonl"
STEPS = 300
SENTENCES = "single sentences of stsb"


def measure(glue: Path, fits: Path, cells: list[tuple[str, Any]]) -> None:
    """Add a row for each task and scope that there is none of."""
    done = {(row["texts"], row["scope"]) for row in read_lines(ROWS)}
    dense, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    for texts, scope in tqdm([cell for cell in cells if cell not in done]):
        task = "stsb" if texts == SENTENCES else texts
        train, dev = load_task(glue / task, "train"), load_task(glue / task, "dev").head(JUDGED, seed=0)
        scores = score_heads(
            dense, train.head(SCORED, seed=0).texts, "smp-plus", tokenizer, max_length=LENGTH, seed=0, progress=False,
            pruner=str(fits / task),
        )  # fmt: skip
        mask = select_heads(scores, 0.5, scope)
        loss = MaskLoss(dense, forward_arguments(dense, batches(tokenizer, dev.texts, 32, LENGTH)), dev.is_pair)
        row = {"texts": texts, "scope": scope, "ratio": 0.5, "seed": 0, "steps": STEPS, "kl_pruned": loss(mask)}
        pruned = load_model(demo_model(), "cpu")
        remove_heads_(pruned, mask)
        given = [sentence for pair in train.texts for sentence in pair] if texts == SENTENCES else train.texts
        test, start = load_task(glue / "stsb", "test", need_labels=True), time.perf_counter()
        if texts == SENTENCES:
            row["similarity_pruned"] = similarity(pruned, tokenizer, test, None)
        row["taught_on"] = distill_(pruned, dense, given, tokenizer, steps=STEPS, max_length=LENGTH, bf16=True)
        row["seconds"] = time.perf_counter() - start
        if texts == SENTENCES:
            row["similarity"] = similarity(pruned, tokenizer, test, None)
        loss.model = pruned
        row["kl"] = loss({})
        append_line(ROWS, row | made())
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tasks", "similarity"))
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--fits", type=Path, required=True)
    parser.add_argument("--scopes", nargs="+", default=["global", "site"])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    texts = TASKS if options.what == "tasks" else (SENTENCES,)
    measure(options.glue, options.fits, list(itertools.product(texts, options.scopes)))


if __name__ == "__main__":
    main()
