"""What closing gates costs to second order, and how heads make up for each other within a site."""

from __future__ import annotations

from torch import Tensor

from secateur.scorers.base import ScoringTask
from secateur.scorers.labelled import LabelledScorer, gate_gradients, num_texts
from secateur.sites.feed_forward import FeedForwardSite


class FisherScorer(LabelledScorer):
    """Empirical Fisher information of the gates: mean over texts of (∂L/∂gate)², the gates being 1; ≥ 0.

    With `rearrange`, the scores come with each site's whole Fisher matrix, mean of ∂L/∂gate_i · ∂L/∂gate_j, as their
    `interactions`. `select` then picks heads by the diagonal first and swaps kept against dropped heads of a site while
    that lowers the sum of the matrix over the dropped ones: the paper's mask search and mask rearrangement, at whatever
    ratio and allocation the selection is for. The paper's last step, gates tuned away from 0 and 1, has no counterpart,
    since heads are removed here. Neurons are thousands: of these the diagonal alone is found. The other options are
    those of `LabelledScorer`.
    """

    kinds = frozenset({"heads", "neurons", "layers"})
    description = "Fisher information of the gates on the task's loss, masks rearranged within sites"
    source = "Kwon et al. 2022 (arXiv 2204.09656)"
    passes = "1, and 1 backward, after fine-tuning"

    def __init__(
        self, rearrange: bool = True, warmup_epochs: float | None = None, warmup_learning_rate: float = 5e-5
    ) -> None:
        super().__init__(warmup_epochs, warmup_learning_rate)
        self.rearrange = rearrange

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Run the batches forward and back once, after the fine-tuning that the model may need."""
        whole = self.rearrange and all(site.kind != FeedForwardSite.kind for site in task.sites.values())
        sums: dict[str, Tensor] = {}
        with self.classifier(task) as model:
            for rows in gate_gradients(task, model):
                for name, row in rows.items():
                    found = row.T @ row if whole else row.square().sum(dim=0)
                    sums[name] = sums[name] + found if name in sums else found
        return {name: total / num_texts(task) for name, total in sums.items()}
