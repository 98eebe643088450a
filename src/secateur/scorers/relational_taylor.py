"""What leaving one head out would cost, to second order, from gradients instead of a pass for each head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.relations import gated_representations, relations, with_relations
from secateur.scorers.base import Scorer, ScoringTask
from secateur.support.randomness import generator


class RelationalTaylorScorer(Scorer):
    """Second-order Taylor estimate of the relational KL when a head alone is gated; the mean over batches, ≥ 0.

    The KL between the dense model and itself is a minimum: its gradient on the gates is zero, and what remains to
    lowest order is half of its second derivative. For a KL that is exactly the Gauss-Newton (= Fisher) term: a pair of
    similarities with difference d and probability p = sigmoid(d) costs ½ p(1-p) (∂d/∂gate)² when the gate closes. The
    mean over pairs, halved once more as `relational_kl` averages over entries, is the score. So this approximates
    `leave_one_out` without a pass for each head, and needs no labels and no step size.

    The sum of squared derivatives over thousands of pairs comes from few backward passes (Hutchinson's estimator): of
    Σ ±√(p(1-p)) d with random signs, the squared gradient has the wanted sum as its mean. Its relative error is about
    √(2 / (samples · batches)), a quarter for 8 batches and the default `samples`.
    """

    description = "relational KL when the head alone is gated, estimated to second order from gradients"
    source = "this project: the loss of arXiv 2011.03770, as in optimal brain damage (LeCun et al. 1989)"
    passes = "1, and 4 backward"
    needs_gradients = True

    def __init__(self, samples: int = 4) -> None:
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise invalid("samples", "be a whole number from 1", samples)
        self.samples = samples

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Run every batch once with open gates and back-propagate `samples` times."""
        batches = with_relations(task.batches)
        scores = {name: torch.zeros(site.num_units, dtype=torch.float64) for name, site in task.sites.items()}

        def run(number: int) -> list[dict[str, Tensor]]:
            random = generator(task.reading.seed, number)  # of the batch alone, whoever computes it
            gates = {
                name: torch.ones(site.num_units, device=task.model.device, requires_grad=True)
                for name, site in task.sites.items()
            }
            pairs = relations(gated_representations(task.model, batches[number], gates, task.is_pair).float())
            draws = [torch.randint(0, 2, (len(pairs),), generator=random) * 2 - 1 for _ in range(self.samples)]
            return [kl_sample(pairs, gates, signs.to(pairs)) for signs in draws]

        for found in task.share(run, range(len(batches))):
            for sample in found:
                for name, row in sample.items():
                    scores[name] += row / (self.samples * len(batches))
        return scores


def kl_sample(pairs: Tensor, gates: Mapping[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
    """Return one draw whose mean over signs is the second-order relational KL of closing each gate: `[heads]`, ≥ 0.

    `pairs` are the log-probabilities `[pairs, 2]` of `relations`, made with `gates` that are all 1; `signs` `[pairs]`
    are 1 or -1. The graph of `pairs` is kept.
    """
    probabilities = pairs.detach().exp()
    directions = signs * probabilities.prod(dim=1).sqrt()
    total = (directions * (pairs[:, 0] - pairs[:, 1])).sum()
    gradients = torch.autograd.grad(total, list(gates.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros(gate.shape, dtype=torch.float64)
        if gradient is None
        else gradient.double().square().cpu() / (4 * len(pairs))
        for (name, gate), gradient in zip(gates.items(), gradients, strict=True)
    }
