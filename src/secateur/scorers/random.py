"""Scores without knowledge: the floor that every criterion must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.scorers.base import Scorer, ScoringTask


class RandomScorer(Scorer):
    """Uniform numbers in [0, 1), the same for the same seed."""

    kinds = frozenset({"heads", "neurons", "layers"})
    description = "uniform random numbers: the floor that every criterion must beat"
    source = "baseline"
    passes = "0"
    needs_texts = False

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Draw one number for each unit, site by site."""
        random = torch.Generator().manual_seed(task.reading.seed)
        return {name: torch.rand(site.num_units, generator=random) for name, site in task.sites.items()}
