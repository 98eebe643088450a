"""What breaks when a head alone is gone: exact for single heads, at the price of a pass for each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.relations import gated_representations, relational_kl, with_relations
from secateur.scorers.base import Scorer, ScoringTask
from secateur.texts.batches import Batch


class LeaveOneOutScorer(Scorer):
    """Relational KL between the texts' representations with and without a unit; the mean over batches."""

    kinds = frozenset({"heads", "layers"})
    description = "relational KL of the representations when the head alone is gated"
    source = "this project, with the loss of arXiv 2011.03770"
    passes = "1 + number of heads"

    @torch.no_grad()
    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Run every batch once dense and once for each head."""
        heads = [(name, h) for name, site in task.sites.items() for h in range(site.num_units)]
        scores = {name: torch.zeros(site.num_units, dtype=torch.float64) for name, site in task.sites.items()}
        batches = with_relations(task.batches)

        def run(batch: Batch) -> list[Tensor]:
            before = gated_representations(task.model, batch, {}, task.is_pair)
            found = []
            for name, head in heads:
                gate = torch.ones(task.sites[name].num_units)
                gate[head] = 0
                after = gated_representations(task.model, batch, {name: gate}, task.is_pair)
                found.append(relational_kl(before, after).double().cpu())
            return found

        for found in task.share(run, batches, "leave one out"):
            for (name, head), value in zip(heads, found, strict=True):
                scores[name][head] += value / len(batches)
        return scores
