"""A mask fine-tuned on a GLUE task as `secateur compare` does it, for experiments that bring masks of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import made
from transformers import set_seed

from secateur.comparing.protocols import Protocol
from secateur.demo import demo_model
from secateur.finetuning.evaluate import main_metric
from secateur.finetuning.finetune import finetune, load_classifier
from secateur.models.loading import load_model, load_tokenizer, quiet_transformers
from secateur.removal.remove import remove_
from secateur.restoring.distillation import distill_
from secateur.restoring.reconstruction import reconstruct_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.texts.data import load_task
from secateur.units.masks import Mask
from secateur.units.scores import Scores

LITE = Protocol(max_train=1000, max_length=64, epochs=3, learning_rate=1e-4)
"""As in results/rivals.jsonl."""
FULL = Protocol(max_train=None, max_length=128, epochs=3, learning_rate=1e-4)
"""All training texts, as in results/full_protocol.jsonl."""


def score_texts(model: Any, tokenizer: Any, texts: list[Any], scorer: str, seed: int, **options: Any) -> Scores:
    """Score heads as the runs of results/rivals.jsonl did."""
    return score(
        model,
        texts,
        scorer,
        tokenizer,
        reading=Reading(max_length=LITE.max_length, seed=seed, progress=False),
        **options,
    )


def finetune_mask(
    glue: Path,
    task: str,
    seed: int,
    kept: dict[str, list[int]] | None,
    training: Protocol = LITE,
    device: str = "cpu",
    reconstruct: int = 0,
    distill: int = 0,
    bf16: bool = True,
) -> dict[str, Any]:
    """Fine-tune all-MiniLM-L6-v2 with these heads alone (None: with all of them).

    `reconstruct`: how many of the training texts the output projections are refitted on before. `distill`: in how many
    steps the dense model teaches the pruned one then, on the texts of the whole train split. `bf16`: train in bfloat16
    autocast, else in float32, for processors that compute bfloat16 many times as slowly.
    """
    train, dev = (load_task(glue / task, split, need_labels=True) for split in ("train", "dev"))
    unlabelled = train.texts
    if training.max_train is not None:
        train = train.head(training.max_train, seed=seed)
    set_seed(seed)  # draws the classification head
    with quiet_transformers(False):
        model, tokenizer = load_classifier(demo_model(), train, dev), load_tokenizer(demo_model())
    restored: dict[str, Any] = {}
    if kept is not None:
        heads = {name: torch.zeros(model.config.num_attention_heads, dtype=torch.bool) for name in kept}
        for name, row in heads.items():
            row[kept[name]] = True
        mask = Mask(heads)
        if reconstruct:
            texts = train.head(reconstruct, seed=seed).texts
            losses = reconstruct_(
                model.to(device), mask, texts, tokenizer, reading=Reading(max_length=training.max_length)
            )
            restored |= {"reconstruct": reconstruct, "losses": losses}
        remove_(model, mask)
        if distill:
            losses = distill_(
                model.to(device),
                load_model(demo_model(), device),
                unlabelled,
                tokenizer,
                steps=distill,
                reading=Reading(batch_size=training.batch_size, max_length=training.max_length, seed=seed, bf16=bf16),
            )
            restored |= {"distill": distill, "distillation": losses}
    _, result = finetune(
        model,
        train,
        dev,
        tokenizer=tokenizer,
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        reading=Reading(
            batch_size=training.batch_size,
            max_length=training.max_length,
            seed=seed,
            bf16=bf16,
            device=device,
            progress=False,
        ),
    )
    return {
        "task": task,
        "seed": seed,
        "kept_heads": kept,
        **restored,
        "bf16": bf16,
        "metric": main_metric(dev),
        "value": result.metrics[main_metric(dev)],
        "training_seconds": result.seconds,
    } | made(f"on {device}")


def key(row: dict[str, Any]) -> tuple[str, int, str, int, int]:
    """Return what a run depends on."""
    heads = json.dumps(row["kept_heads"], sort_keys=True)
    return row["task"], row["seed"], heads, row.get("reconstruct", 0), row.get("distill", 0)
