"""How sure a head is: the largest weight that each token's attention gives."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.model.probe import HeadReading
from secateur.scorers.base import Batch, ScoringTask, StreamingScorer, mean_over_tokens


class ConfidenceScorer(StreamingScorer):
    """The maximum of each token's attention distribution; mean over tokens, then over texts: in [0, 1].

    Voita et al. leave out the end-of-sentence symbol, which is no real token. Here every special token (start, end,
    separator, padding, as the tokenizer or else the config names them) is left out in the same way: it neither counts
    as a token that looks nor as one that is looked at. A head that rests on [SEP] is thus not confident. Weights are
    not scaled up for what was left out. A text of special tokens alone counts as 0.
    """

    description = "mean of the largest attention weight of every token, special tokens left out"
    source = "Voita et al. 2019 (arXiv 1905.09418)"
    weights = True

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return the mean largest weight of each text and head."""
        assert reading.weights is not None  # this class asks for them
        weights, words = reading.weights.float(), _words(batch, task.special_ids)
        if words is not None and words.shape == (len(weights), weights.shape[-1]):
            weights = weights * words[:, None, None, :].to(weights)
        return mean_over_tokens(weights.amax(dim=-1).transpose(1, 2), words)


def _words(batch: Batch, special_ids: frozenset[int]) -> Tensor | None:
    """Return 1 for every token that is a word, 0 for special tokens and padding, `[batch, tokens]`; None for images."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return mask
    words = ~torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device))
    return words if mask is None or mask.shape != ids.shape else words & (mask > 0)
