"""A subset of heads of a fixed size, learned with the task."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.scorers.base import ScoringTask
from secateur.scorers.learned import GateLearningScorer
from secateur.support.checks import is_number
from secateur.units.select import removable


class DspScorer(GateLearningScorer):
    """Differentiable subset pruning: the weight of every head after learning which ones to keep; higher = keep.

    Each batch adds Gumbel noise to the weights of all heads of the model and keeps the highest `k` in a relaxed way:
    gates that add up to k and become 0 or 1 as the temperature falls. `k` is what the caller's `pruning_ratio` leaves
    of all heads together, so "ranking" at the same ratio selects the subset that was learned. As in the paper,
    the weights are learned jointly with the task, from the pre-trained model (`warmup_epochs` is 0 by default).

    - `temperature`, `final_temperature`: of the relaxation, falling geometrically from step to step.
    - `straight_through`: whether the forward pass has gates of exactly 0 or 1, and the relaxed ones the gradient.

    Temperatures and lengths are this project's, for few texts. Other options: `GateLearningScorer`.
    """

    description = "weights of a Gumbel top-k subset of heads learned while a copy is fine-tuned"
    source = "Li et al. 2021 (arXiv 2108.04657)"
    passes = "3 forward and backward"
    needs_ratio = True

    def __init__(
        self,
        temperature: float = 1.0,
        final_temperature: float = 0.1,
        straight_through: bool = False,
        epochs: float = 3.0,
        learning_rate: float = 5e-5,
        gate_learning_rate: float = 0.1,
        warmup_epochs: float | None = 0.0,
        warmup_learning_rate: float = 5e-5,
    ) -> None:
        super().__init__(epochs, learning_rate, gate_learning_rate, warmup_epochs, warmup_learning_rate)
        for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
            if not is_number(value, above=0):
                raise invalid(name, "be a number above 0", value)
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.straight_through = straight_through

    def gates(self, numbers: Tensor, task: ScoringTask, progress: float) -> Tensor:
        """Draw a relaxed subset of all heads."""
        temperature = self.temperature * (self.final_temperature / self.temperature) ** progress
        noise = -torch.log(torch.empty_like(numbers).exponential_())  # Gumbel
        kept = max(1, len(numbers) - removable(len(numbers), task.cut.pruning_ratio))
        return relaxed_top_k(numbers + noise, kept, temperature, self.straight_through)


def relaxed_top_k(keys: Tensor, k: int, temperature: float, straight_through: bool = False) -> Tensor:
    """Return gates `[n]` in [0, 1] that add up to `k`, nearly 1 for the `k` highest keys at low temperatures.

    k times in a row a softmax of the keys over the temperature is taken, and the keys fall by the logarithm of what it
    left: sampling without replacement, relaxed (Xie and Ermon 2019, arXiv 1901.10517). `straight_through` returns 0 and
    1 with the gradient of these gates.
    """
    current, total = keys, torch.zeros_like(keys)
    for _ in range(k):
        chosen = torch.softmax(current / temperature, dim=0)
        current = current + (1 - chosen).clamp_min(torch.finfo(keys.dtype).tiny).log()
        total = total + chosen
    if not straight_through:
        return total
    hard = torch.zeros_like(keys).index_fill(0, keys.topk(k).indices, 1.0)
    return hard + total - total.detach()
