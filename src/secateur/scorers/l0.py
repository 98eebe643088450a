"""Gates that pay for being open, learned with the task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.scorers.base import ScoringTask
from secateur.scorers.learned import GateLearningScorer
from secateur.support.checks import is_number

# Louizos et al.: the concrete distribution's temperature, and the interval it is stretched to before it is clipped.
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1


class L0Scorer(GateLearningScorer):
    """The log α of every head's hard concrete gate after fine-tuning with an L0 penalty: higher = open.

    While the model learns, each batch draws gates that are often exactly 0 or 1, and the loss has added `penalty` times
    the expected number of open gates. The final gate, clip(sigmoid(log α) · 1.2 - 0.1, 0, 1), rises with log α, which
    is the score because it tells heads apart where the gate is 0 or 1 for all of them. As in the paper, the model has
    learned the task before (`warmup_epochs`). `start` is the first log α: gates begin open, with probability 0.97
    by default. Start, penalty and lengths are this project's, for few texts. Other options: `GateLearningScorer`.
    """

    description = "hard concrete gates learned with an L0 penalty while a copy is fine-tuned"
    source = "Voita et al. 2019 (arXiv 1905.09418), with the gates of Louizos et al. 2018 (arXiv 1712.01312)"
    passes = "3 forward and backward, after fine-tuning"

    def __init__(
        self,
        penalty: float = 0.02,
        start: float = 2.0,
        epochs: float = 3.0,
        learning_rate: float = 5e-5,
        gate_learning_rate: float = 0.1,
        warmup_epochs: float | None = None,
        warmup_learning_rate: float = 5e-5,
    ) -> None:
        super().__init__(epochs, learning_rate, gate_learning_rate, warmup_epochs, warmup_learning_rate)
        if not is_number(penalty, least=0):
            raise invalid("penalty", "be a number from 0", penalty)
        if not is_number(start):
            raise invalid("start", "be a finite number", start)
        self.weight = penalty
        self.start = start

    def gates(self, numbers: Tensor, task: ScoringTask, progress: float) -> Tensor:
        """Draw hard concrete gates."""
        return hard_concrete(numbers, torch.rand_like(numbers))

    def penalty(self, numbers: Tensor) -> Tensor:
        """Return the price of the expected number of open gates."""
        return self.weight * open_probability(numbers).sum()


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return the gates in [0, 1] that uniform numbers in [0, 1) stand for, of the shape of `log_alpha`."""
    noise = torch.logit(uniform, eps=1e-6)
    return (torch.sigmoid((noise + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return the probability that a gate is above 0, of the shape of `log_alpha`."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
