"""What distillation without labels saves of the text representations, before fine-tuning.

As reconstruction.py, whose masks these are: half of the heads of all-MiniLM-L6-v2 go, by smp-plus fitted without the
task, and the relational KL is of 128 dev texts; but then the dense model teaches the pruned one on the texts of the
train split, as `secateur compare --distill 300 --bf16` does. Then the same on the single sentences of STS-B, with the
similarity on its test pairs.
"""

from __future__ import annotations

import itertools
import time

from benchmarks.measures.representations import similarity
from benchmarks.provenance import made
from benchmarks.runs import JUDGED, LENGTH, SCORED, Run, inputs, minilm
from tqdm import tqdm

from secateur.choosing.mask_loss import MaskLoss
from secateur.demo import demo_model
from secateur.models.loading import load_model
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.units.masks import PresentMask
from secateur.units.select import Allocation, select

SENTENCES = "single sentences of stsb"


def measure(run: Run, *, allocations: list[Allocation], steps: int) -> None:
    """Add a row for each task and allocation that there is none of."""
    done = {(row["texts"], row["allocation"]) for row in run.rows()}
    dense, tokenizer = minilm()
    cells = [cell for cell in itertools.product((*run.tasks, SENTENCES), allocations) if cell not in done]
    for texts, allocation in tqdm(cells):
        task = "stsb" if texts == SENTENCES else texts
        train, dev = run.task(task), run.task(task, "dev").head(JUDGED, seed=0)
        scores = score(
            dense,
            train.head(SCORED, seed=0).texts,
            "smp-plus",
            tokenizer,
            reading=Reading(max_length=LENGTH, seed=0, progress=False),
            **run.unseen(task),
        )
        mask = select(scores, 0.5, allocation)
        loss = MaskLoss(dense, inputs(dense, tokenizer, dev.texts), dev.is_pair)
        row = {
            "texts": texts,
            "allocation": allocation,
            "ratio": 0.5,
            "seed": 0,
            "steps": steps,
            "kl_pruned": loss(mask.present(find_sites(dense))),
        }
        pruned = load_model(demo_model(), "cpu")
        remove_(pruned, mask)
        given = [sentence for pair in train.texts for sentence in pair] if texts == SENTENCES else train.texts
        test, start = run.task("stsb", "test", need_labels=True), time.perf_counter()
        if texts == SENTENCES:
            row["similarity_pruned"] = similarity(pruned, tokenizer, test, None)
        row["taught_on"] = distill_(
            pruned, dense, given, tokenizer, steps=steps, reading=Reading(max_length=LENGTH, bf16=True)
        )
        row["seconds"] = time.perf_counter() - start
        if texts == SENTENCES:
            row["similarity"] = similarity(pruned, tokenizer, test, None)
        loss.model = pruned
        row["kl"] = loss(PresentMask({}))
        run.add(row | made())
        print(row)
