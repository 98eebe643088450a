"""Size of a head's weights: how much it could write, whatever the texts."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.models.fetched import weight_of
from secateur.scorers.base import Scorer, ScoringTask
from secateur.sites.layout import Site, Slice


class MagnitudeScorer(Scorer):
    """Product of the Frobenius norms of a head's value weights and of its part of the output projection.

    The product bounds the norm of the head's value-to-output map. Heads that share a key-value head share its norm. Of
    a neuron, the rows that write it take the place of the value weights.
    """

    kinds = frozenset({"heads", "neurons"})
    description = "norm of a head's value weights times norm of its output weights"
    source = "baseline, after magnitude pruning (Han et al. 2015)"
    passes = "0"
    needs_texts = False

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Read the weights alone."""
        return {name: self._site(task, site) for name, site in task.sites.items()}

    def _site(self, task: ScoringTask, site: Site) -> Tensor:
        # Where query, key and value cannot be told apart, all that a head computes from counts.
        written = next((found for role in ("value", "head", "neuron") if (found := site.slices_of(role))), [])
        value = self._squares(task, written, site.num_groups)
        output = self._squares(task, site.slices_of("output"), site.num_units)
        return (value.repeat_interleave(site.group_size) * output).sqrt()

    def _squares(self, task: ScoringTask, pieces: list[Slice], heads: int) -> Tensor:
        """Return the sum of squares of each head's weights, `[heads]`; biases do not count."""
        total = torch.zeros(heads, dtype=torch.float64)
        for piece in pieces:
            weight = weight_of(task.model, piece.parameter).double().cpu()
            if weight.ndim > 1:
                rows = weight.square().sum(dim=[a for a in range(weight.ndim) if a != piece.axis])
                owners = torch.tensor(piece.owners)
                total.index_add_(0, owners[owners >= 0], rows[owners >= 0])
        return total
