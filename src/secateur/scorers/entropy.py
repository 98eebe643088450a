"""How widely a head looks: the entropy of its attention."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.pruners.tokens import mean_over_tokens
from secateur.scorers.base import ScoringTask, StreamingScorer
from secateur.sites.gating import HeadReading
from secateur.texts.batches import Batch


class EntropyScorer(StreamingScorer):
    """Minus the entropy, in nats, of a head's attention distributions; mean over real tokens, then over texts.

    Scores lie in [-log(tokens), 0]: 0 for a head whose every token looks at one token alone. Clark et al. measure this
    entropy and call heads of high entropy broad, near to a bag of words; that these go first is this project's reading,
    in line with Voita et al. 2019, who find confident heads to be the important ones. Keys that are special tokens
    count like others.
    """

    description = "minus the mean entropy of a head's attention: focused heads stay"
    source = "entropy: Clark et al. 2019 (arXiv 1906.04341); its use as a score: baseline of this project"
    weights = True

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return minus the mean entropy of each text and head."""
        assert reading.weights is not None  # this class asks for them
        entropies = torch.special.entr(reading.weights.float()).sum(dim=-1)  # [batch, heads, queries]
        return -mean_over_tokens(entropies.transpose(1, 2), batch.get("attention_mask"))
