"""How much a head writes, and more where it finds a word of one text in the other: what comparing two texts needs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from secateur.errors import UnsupportedModelError, invalid
from secateur.pruners.tokens import in_decoder
from secateur.pruners.word_matches import MATCH_WEIGHT, MATCHES, matching
from secateur.scorers.base import ScoringTask, StreamingScorer
from secateur.scorers.contribution import ContributionScorer
from secateur.sites.gating import HeadReading
from secateur.support.checks import is_number
from secateur.texts.batches import Batch


class MatchingScorer(ContributionScorer):
    """Mean over texts of contribution norm · (1 + `weight` · matching); single texts: the contribution norm alone.

    The matching of a head in a pair of texts is the attention that words of one text give to the same word (token) of
    the other, less what they would give if they attended to all real tokens alike, mean over the words that are in
    both: in [0, 1]. Where the model's inputs do not say which text a token belongs to (no token types), the same word
    at any other place counts. Special tokens are no words. In a decoder beside an encoder nothing is matched.

    A model that reads two texts at once compares them by a few such heads. The frozen model's representations hardly
    need them, so that criteria which look at those let them go; a task on pairs that is fine-tuned without them stays
    far behind. Heads that look at earlier copies of a token are known as duplicate-token heads (Wang et al. 2022).
    """

    kinds = frozenset({"heads"})
    description = "contribution, and more for heads that match words between the two texts of a pair"
    source = "this project; duplicate-token heads: Wang et al. 2022 (arXiv 2211.00593)"

    def __init__(self, weight: float = MATCH_WEIGHT) -> None:
        super().__init__()
        if not is_number(weight, least=0):
            raise invalid("weight", "be a number from 0", weight)
        self.weight = weight

    def reads_maps(self, task: ScoringTask) -> bool:
        """Return whether texts are pairs; single ones have nothing to match."""
        return task.is_pair

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return the contribution norm of each text and head, weighted by its matching."""
        norms = super().read(reading, batch, task)
        if reading.weights is None:  # single texts
            return norms
        if in_decoder(task.model, reading.site):  # it reads other tokens than the batch's
            return norms
        return norms * (1 + self.weight * matching(reading.weights, batch, task.special_ids).to(norms))


class _Matches(StreamingScorer):
    """Mean matching over texts."""

    weights = True

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        found = matching(cast(Tensor, reading.weights), batch, task.special_ids)
        return torch.zeros_like(found) if in_decoder(task.model, reading.site) else found


def heads_that_match(task: ScoringTask) -> dict[str, Tensor]:
    """Return, for each site, which heads have a matching of 0.1 or more on the task's pairs, bool `[heads]`; one pass.

    No head where the texts are no pairs, or where the model makes no attention maps.
    """
    none = {name: torch.zeros(site.num_units, dtype=torch.bool) for name, site in task.sites.items()}
    if not task.is_pair:
        return none
    try:
        found = _Matches().score(task)
    except UnsupportedModelError:
        return none
    return {name: row >= MATCHES for name, row in found.items()}
