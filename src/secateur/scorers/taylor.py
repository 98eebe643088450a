"""How much the loss changes with a head's gate, to first order."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.scorers.base import ScoringTask
from secateur.scorers.labelled import LabelledScorer, gate_gradients, num_texts


class TaylorScorer(LabelledScorer):
    """Mean over texts of `|∂L/∂gate|`, the derivative of a text's loss on the head's gate at 1: ≥ 0.

    `normalize` divides the scores of a site by their l2 norm, as the paper does for every layer; it changes the choice
    with allocation "ranking" alone. The other options are those of `LabelledScorer`.
    """

    kinds = frozenset({"heads", "neurons", "layers"})
    description = "mean absolute gradient of the task's loss on the head's gate"
    source = "Michel et al. 2019 (arXiv 1905.10650)"
    passes = "1, and 1 backward, after fine-tuning"

    def __init__(
        self, normalize: bool = True, warmup_epochs: float | None = None, warmup_learning_rate: float = 5e-5
    ) -> None:
        super().__init__(warmup_epochs, warmup_learning_rate)
        self.normalize = normalize

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Run the batches forward and back once, after the fine-tuning that the model may need."""
        sums = {name: torch.zeros(site.num_units, dtype=torch.float64) for name, site in task.sites.items()}
        with self.classifier(task) as model:
            for rows in gate_gradients(task, model):
                for name, row in rows.items():
                    sums[name] += row.abs().sum(dim=0)
        means = {name: total / num_texts(task) for name, total in sums.items()}
        if not self.normalize:
            return means
        return {name: mean / mean.norm().clamp_min(1e-20) for name, mean in means.items()}
