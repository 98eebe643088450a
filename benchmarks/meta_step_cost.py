"""What a meta-training step costs beside its parts, on one batch, run in turn.

    python benchmarks/meta_step_cost.py

The parts: a dense forward pass with maps, a gated forward and backward pass, the pruner's forward and backward pass.
Prints and writes the ratio step / sum of parts, round by round (benchmarks/results/meta_step_cost.json).
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoTokenizer

from provenance import provenance
from secateur.demo import demo_model, demo_task
from secateur.meta_training.config import MetaTrainingConfig
from secateur.meta_training.meta_step import MetaTraining
from secateur.meta_training.subjects import Subject
from secateur.pruners.map_network import to_network_size
from secateur.relations import relational_kl, represent
from secateur.sites.gating import probe
from secateur.support.files import write_text
from secateur.texts.data import Task

BATCH, LENGTH, ROUNDS = 60, 128, 7


def main() -> None:
    torch.set_num_threads(2)
    texts = demo_task()[0].texts[:BATCH]
    # Joined in threes, so that texts are about as long as sentence pairs.
    task = Task("texts", [" ".join(texts[i : i + 3]) for i in range(BATCH)])
    subject = Subject(AutoModel.from_pretrained(demo_model()), AutoTokenizer.from_pretrained(demo_model()))
    config = MetaTrainingConfig(batch_size=BATCH, batches_per_step=1, max_length=LENGTH)
    training = MetaTraining([subject], [task], config, Accelerator(cpu=True))
    batch = subject.batch(task.texts, LENGTH)
    model, maps = subject.model, {}

    def dense() -> None:
        with torch.no_grad(), probe(model, lambda r: maps.__setitem__(r.site, r.weights), weights=True):
            model(**batch)

    def gated() -> None:
        gates = {site: torch.ones(heads, requires_grad=True) for site, heads in subject.heads.items()}
        with probe(model, gates=gates):
            pruned = represent(model, model(**batch), batch, False)
        relational_kl(pruned.detach() + 0.1 * torch.randn_like(pruned), pruned).backward()

    def pruner() -> None:
        fitted = {site: to_network_size(m, batch["attention_mask"]) for site, m in maps.items()}
        torch.cat(list(training.scores(fitted, False).values())).sum().backward()

    def step() -> None:
        training.gradients(0)

    seconds: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for run in (dense, gated, pruner, step):
            start = time.perf_counter()
            run()
            if number:
                seconds.setdefault(run.__name__, []).append(time.perf_counter() - start)
    ratios = [s / (d + g + p) for d, g, p, s in zip(*seconds.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print({name: f"{value:.2f} s" for name, value in medians.items()})
    print(f"step / sum of parts: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    result = {
        **provenance("python benchmarks/meta_step_cost.py"),
        "batch": [BATCH, batch["input_ids"].shape[1]],
        "seconds": seconds,
        "ratios": ratios,
    }
    write_text(Path(__file__).parent / "results" / "meta_step_cost.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
