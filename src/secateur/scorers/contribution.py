"""How much a unit writes: the size of the vector it adds to the residual stream, read in the one dense pass."""

from __future__ import annotations

from torch import Tensor

from secateur.pruners.tokens import mean_over_tokens
from secateur.pruners.writes import contribution_norms, gram_matrices
from secateur.scorers.base import ScoringTask, StreamingScorer
from secateur.scorers.neuron_contribution import neuron_contributions
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.gating import HeadReading
from secateur.texts.batches import Batch


class ContributionScorer(StreamingScorer):
    """Mean over real tokens, then over texts, of ‖(A_h V_h) W_O^h‖.

    The norm of x W is the square root of x (W Wᵀ) xᵀ, so each head's Gram matrix `[width, width]` stands for its part
    of the output projection, and no vector as wide as the model is ever made for every head. Where a model multiplies
    its heads by gates of their own before the projection (Qwen3-Next), A_h V_h is what the gate is given. Of neurons
    see `neuron_contributions`.
    """

    kinds = frozenset({"heads", "neurons"})

    description = "mean norm of the vector that a head adds to the residual stream"
    source = "this project; norms of value-weighted vectors are due to Kobayashi et al. 2020 (arXiv 2004.10102)"

    def __init__(self) -> None:
        self._grams: dict[str, Tensor] = {}

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Prepare each head's Gram matrix, then stream the batches; neurons need none."""
        if all(isinstance(site, FeedForwardSite) for site in task.sites.values()):
            return neuron_contributions(task)
        self._grams = {name: gram_matrices(task.model, site) for name, site in task.sites.items() if site.num_units}
        try:
            return super().score(task)
        finally:
            self._grams = {}

    def read(self, reading: HeadReading, batch: Batch, task: ScoringTask) -> Tensor:
        """Return the mean contribution norm of each text and head."""
        if reading.site not in self._grams:  # emptied by an earlier pruning
            return reading.outputs.new_zeros(len(reading.outputs), 0)
        norms = contribution_norms(reading.outputs, self._grams[reading.site])
        return mean_over_tokens(norms, batch.get("attention_mask"))
