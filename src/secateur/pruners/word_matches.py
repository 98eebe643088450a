"""Which heads find a word of one text in the other: what comparing two texts needs."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.pruners.tokens import mean_over_tokens, words_of
from secateur.texts.batches import Batch

MATCH_WEIGHT = 8.0
"""How much a match counts: a head that rests on matches alone scores as one that writes nine times as much."""


MATCHES = 0.1
"""The matching from which on a head is one that matches words: those of four models have .11 to .5 between two texts
that are told apart, and no other head as much as .1 (docs/matching.md)."""


def matching(weights: Tensor, batch: Batch, special_ids: frozenset[int]) -> Tensor:
    """Return the matching of each text and head, `[batch, heads]` in [0, 1].

    `weights` are maps `[batch, heads, tokens, tokens]`. 0 where no word is in both texts, and for maps with another
    number of queries or keys than the batch has tokens.
    """
    # Layers of a model that is spread over devices make their maps on several.
    batch = {name: value.to(weights.device) for name, value in batch.items() if isinstance(value, Tensor)}
    ids, words = batch.get("input_ids"), words_of(batch, special_ids)
    texts, heads, queries, keys = weights.shape
    if ids is None or words is None or not ids.shape == words.shape == (texts, queries) or queries != keys:
        return weights.new_zeros(texts, heads)
    words = words.bool()
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & words.unsqueeze(2) & words.unsqueeze(1)
    types = batch.get("token_type_ids")
    if types is not None and types.shape == ids.shape and bool((types != types[:, :1]).any()):
        same &= types.unsqueeze(2) != types.unsqueeze(1)
    else:
        same &= ~torch.eye(queries, dtype=torch.bool, device=ids.device)
    mask = batch.get("attention_mask")
    real = torch.ones_like(words) if mask is None or mask.shape != ids.shape else mask.bool()
    chance = same.sum(dim=2) / real.sum(dim=1, keepdim=True).clamp(min=1)
    found = (weights.float() * same.unsqueeze(1)).sum(dim=-1).transpose(1, 2) - chance.unsqueeze(-1)
    return mean_over_tokens(found, same.any(dim=2)).clamp(min=0)
