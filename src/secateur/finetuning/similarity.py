"""How well the embeddings of an encoder without a trained head tell how alike two texts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from secateur.errors import invalid
from secateur.finetuning.evaluate import EVALUATION, ready_to_evaluate, regression_metrics
from secateur.models.base_model import base_of
from secateur.models.finite import check_finite
from secateur.models.inputs import forward_arguments
from secateur.settings import Reading, settings_of
from secateur.support.interrupts import interruptible
from secateur.texts.data import Task
from secateur.texts.halving import in_batches_that_fit
from secateur.texts.tokenization import batches


@interruptible
def evaluate_similarity(
    model: Any, tokenizer: Any, task: Task, pooling: Sequence[str] = ("mean",), *, reading: Reading | None = None
) -> dict[str, float]:
    """Return `pearson` and `spearman` between a task's scores and the cosines of the embeddings of its pairs.

    An embedding is what `pooling` (names of `POOLINGS`, joined where there are several) makes of the last states of
    the base model, or of its encoder where it has a decoder too. Nothing is trained.

    Raises `InvalidInputError` unless the task has pairs of texts with scores, for a pooling of another name, and for
    NaN or infinity. Where a batch does not fit into memory, the batch size is halved, with a `SecateurWarning`.
    """
    if not task.is_pair or not task.is_regression:
        raise invalid("task", "have pairs of texts with a score each", task.name)
    for name in pooling:
        if name not in POOLINGS:
            raise invalid("pooling", f"be among {', '.join(POOLINGS)}", name)
    reading = EVALUATION if reading is None else settings_of(reading, Reading)
    both = [text for pair in task.texts for text in pair]
    order = sorted(range(len(both)), key=lambda i: len(both[i]))  # texts of similar length share a batch
    ordered = [both[i] for i in order]
    rows = in_batches_that_fit(partial(_embeddings, model, tokenizer, ordered, pooling), reading)
    embeddings = torch.empty_like(rows)
    embeddings[order] = rows
    cosines = torch.cosine_similarity(embeddings[::2], embeddings[1::2])
    assert task.labels is not None  # a regression has them
    return regression_metrics(cosines.tolist(), task.labels)


def _embeddings(model: Any, tokenizer: Any, texts: list[str], pooling: Sequence[str], reading: Reading) -> Tensor:
    """Return an embedding for each text, float32 `[texts, numbers]`."""
    encoder = base_of(model)
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    rows = []
    with ready_to_evaluate(model, tokenizer, reading.device) as place, torch.no_grad():
        inputs = batches(tokenizer, texts, reading.batch_size, reading.max_length)
        for batch in tqdm(inputs, desc="embeddings", unit="batch", leave=False, disable=not reading.progress):
            moved = {name: tensor.to(place) for name, tensor in batch.items()}
            run = partial(encoder, **forward_arguments(encoder, [moved])[0])
            states = run()[0]
            check_finite(states, encoder, run)
            mask = moved["attention_mask"][..., None].float()
            rows.append(torch.cat([POOLINGS[name](states.float(), mask) for name in pooling], dim=1).cpu())
    return torch.cat(rows)


def _mean(states: Tensor, weights: Tensor) -> Tensor:
    return (states * weights).sum(1) / weights.sum(1)


def _at(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))[:, 0]


# From the states [texts, tokens, width] and the attention mask [texts, tokens, 1], as 1 and 0, to [texts, width].
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda states, mask: (states * mask).sum(1) / mask.sum(1).sqrt(),
    "weightedmean": lambda states, mask: _mean(states, mask * mask.cumsum(1)),
    "max": lambda states, mask: states.masked_fill(mask == 0, -torch.inf).amax(1),
    "cls": lambda states, mask: _at(states, mask.argmax(1)),
    "lasttoken": lambda states, mask: _at(states, (mask * mask.cumsum(1)).argmax(1)),
}
"""What sentence-transformers makes one embedding of the tokens' states by, under its names."""
