"""Embeddings of sentences, as sentence-transformers makes them of all-MiniLM-L6-v2."""

from __future__ import annotations

from typing import Any

import torch

from secateur.models.inputs import forward_arguments
from secateur.texts.tokenization import batches


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Return mean-pooled embeddings of at most 64 tokens each, `[sentences, width]`, in the order given."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    made = forward_arguments(model, batches(tokenizer, [sentences[i] for i in order], 64, 64))
    rows = []
    for batch in made:
        weights = batch["attention_mask"].unsqueeze(-1).float()
        rows.append((model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1))
    flat = torch.cat(rows)
    return flat[torch.argsort(torch.tensor(order))]
