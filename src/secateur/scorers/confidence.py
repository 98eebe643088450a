"""How sure a head is: the largest weight that each token's attention gives."""

from __future__ import annotations

from torch import Tensor

from secateur.pruners.tokens import mean_over_tokens, words_of
from secateur.scorers.base import ScoringTask, StreamingScorer
from secateur.sites.gating import HeadReading
from secateur.texts.batches import Batch


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
        weights, words = reading.weights.float(), words_of(batch, task.special_ids)
        if words is not None and words.shape == (len(weights), weights.shape[-1]):
            weights = weights * words[:, None, None, :].to(weights)
        return mean_over_tokens(weights.amax(dim=-1).transpose(1, 2), words)
