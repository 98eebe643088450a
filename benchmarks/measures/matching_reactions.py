"""Does fine-tuning need the heads that match tokens in another model too? rxnfp, a BERT for chemical reactions.

    pip install --no-deps rxnfp
    python -m benchmarks.run matching_reactions

A task of pairs made for this: given what goes into a reaction (its first text), is the second text what comes out, or
what comes out of another reaction of the same type? Reactions are made by rule (subjects.py); train and dev share none.
The dense model, and masks that keep the same share of every layer's heads by their contribution: as they are; without
the two heads that match most (as matching_elsewhere.py measures it), the next best in their places; and, for
comparison, without the two that write most of those that match nothing. Each is fine-tuned on 1,000 pairs for 3 epochs
at learning rate 1e-4 in bfloat16 autocast and measured on 800.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from benchmarks.measures.matching_elsewhere import matching_of, read_reactions
from benchmarks.provenance import made
from benchmarks.runs import LENGTH, SCORED, Run
from benchmarks.subjects import reaction_model, typed_reactions
from tokenizers import processors
from transformers import BertForSequenceClassification, BertModel, set_seed

from secateur.finetuning.finetune import finetune
from secateur.removal.remove import remove_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.texts.data import Task
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import select

CHECKPOINT = "bert_pretrained"
RATIOS = (0.5, 0.75)
TRAIN, DEV = 1000, 800


def task(seed: int, count: int, part: int) -> Task:
    """Return pairs, half of them true, of the reactions with that part (0 or 1)."""
    draw = random.Random(seed)
    by_type: dict[str, list[list[str]]] = {}
    for text, kind in typed_reactions(0, 6000)[part::2]:
        by_type.setdefault(kind, []).append(text.split(">>"))
    pairs, labels = [], []
    for number in range(count):
        same_type = by_type[draw.choice(sorted(by_type))]
        left, right = draw.choice(same_type)
        label = number % 2
        while not label and right == (other := draw.choice(same_type)[1]):
            pass
        pairs.append((left, right if label else other))
        labels.append(label)
    return Task("product", pairs, labels)


def classifier(seed: int) -> tuple[Any, Any]:
    set_seed(seed)  # the head
    model, tokenizer = reaction_model("rxnfp", CHECKPOINT, BertForSequenceClassification)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B [SEP]"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=ends
    )
    return model, tokenizer


def masks(seed: int, train: Task, tokenizer: Any) -> dict[tuple[str, float], Mask | None]:
    model, plain = reaction_model("rxnfp", CHECKPOINT, BertModel)
    texts = [">>".join(pair) for pair in train.texts[:SCORED]]
    found = matching_of("rxnfp", model, plain, texts, read_reactions)
    matching = torch.tensor(found["matching"])
    scores = score(
        model,
        train.head(SCORED, seed=seed).texts,
        "contribution",
        tokenizer,
        reading=Reading(max_length=LENGTH, progress=False),
    )
    norms = torch.stack(list(scores.values()))
    two = {
        "without the two that match most": matching.flatten().argsort(descending=True)[:2],
        "without two that write most and match nothing": norms.where(matching < 0.05, 0).flatten().argsort()[-2:],
    }
    chosen: dict[tuple[str, float], Mask | None] = {("dense", 0.0): None}
    for ratio in RATIOS:
        chosen["contribution", ratio] = select(scores, ratio)
        for name, heads in two.items():
            lowered = norms.flatten().clone()
            lowered[heads] = 0
            rows = dict(zip(scores, lowered.view(norms.shape), strict=True))
            chosen[name, ratio] = select(Scores(rows), ratio)
            print(name, [divmod(i, norms.shape[1]) for i in heads.tolist()])
    return chosen


def measure(run: Run) -> None:
    done = {(row["seed"], row["mask"], row["ratio"]) for row in run.rows()}
    dev = task(1, DEV, 1)
    for seed in run.seeds:
        train = task(100 + seed, TRAIN, 0)
        for (name, ratio), mask in masks(seed, train, classifier(seed)[1]).items():
            if (seed, name, ratio) in done:
                continue
            model, tokenizer = classifier(seed)
            if mask is not None:
                remove_(model, mask)
            _, result = finetune(
                model,
                train,
                dev,
                tokenizer=tokenizer,
                epochs=3,
                learning_rate=1e-4,
                reading=Reading(batch_size=32, max_length=LENGTH, seed=seed, bf16=True, device="cpu", progress=False),
            )
            row = {
                "mask": name,
                "ratio": ratio,
                "seed": seed,
                "accuracy": result.metrics["accuracy"],
                "train_texts": TRAIN,
                "dev_texts": DEV,
                "kept_heads": None if mask is None else mask.kept,
            }
            run.add(row | made())
            print(seed, name, ratio, row["accuracy"], flush=True)
