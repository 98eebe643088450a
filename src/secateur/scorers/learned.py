"""What the criteria share that learn gates: fine-tuning of a copy in which every head has a gate of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from secateur.errors import SecateurError, invalid
from secateur.models.inputs import forward_arguments
from secateur.scorers.base import ScoringTask
from secateur.scorers.labelled import LabelledScorer, supervision, text_losses
from secateur.support.checks import is_number
from secateur.texts.batches import Batch
from secateur.texts.tokenization import batches


class GateLearningScorer(LabelledScorer):
    """A criterion that learns one number for each head while a copy of the model learns the task; it is the score.

    Subclasses implement `gates` and, where there is one, `penalty`. Options, beside those of `LabelledScorer`:

    - `epochs`: passes over the labelled texts. Every epoch has a new order; ready inputs stay in their batches.
    - `learning_rate`: of the model's weights (AdamW, linear schedule whose first tenth warms up, as in `finetune`).
    - `gate_learning_rate`: of the heads' numbers, in the same optimizer and schedule.

    Everything random follows from the task's seed, torch's version and the device.
    """

    start = 0.0
    """What the heads' numbers are at first."""

    def __init__(
        self,
        epochs: float,
        learning_rate: float,
        gate_learning_rate: float,
        warmup_epochs: float | None,
        warmup_learning_rate: float,
    ) -> None:
        super().__init__(warmup_epochs, warmup_learning_rate)
        rates = {"epochs": epochs, "learning_rate": learning_rate, "gate_learning_rate": gate_learning_rate}
        for name, value in rates.items():
            if not is_number(value, above=0):
                raise invalid(name, "be a number above 0", value)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.gate_learning_rate = gate_learning_rate

    @abstractmethod
    def gates(self, numbers: Tensor, task: ScoringTask, progress: float) -> Tensor:
        """Draw gates `[all heads]` in [0, 1] for one batch, differentiable; `progress` runs from 0 to 1."""

    def penalty(self, numbers: Tensor) -> Tensor | float:
        """Return what the loss of a batch has added."""
        return 0.0

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Learn on a copy and return the heads' numbers."""
        sizes = [site.num_units for site in task.sites.values()]
        steps = max(1, math.ceil(self.epochs * len(task.batches)))
        with self.classifier(task, own=True) as model:
            model.train()
            numbers = torch.full((sum(sizes),), self.start, device=model.device, requires_grad=True)
            weights = list(model.parameters())
            groups: list[dict[str, Any]] = [
                {"params": weights, "lr": self.learning_rate},
                {"params": [numbers], "lr": self.gate_learning_rate},
            ]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
            stream = islice(_shuffled(task), steps)
            for step, (batch, labels) in enumerate(task.track(stream, steps, "learning gates")):
                drawn = self.gates(numbers, task, step / max(1, steps - 1)).split(sizes)
                gates = dict(zip(task.sites, drawn, strict=True))
                loss = text_losses(model, batch, labels, gates).mean() + self.penalty(numbers)
                if not bool(torch.isfinite(loss)):
                    raise SecateurError(f"the loss became {float(loss.detach())}; try a lower `learning_rate`")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return dict(zip(task.sites, numbers.detach().double().cpu().split(sizes), strict=True))


def _shuffled(task: ScoringTask) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their labels without end, in a new random order each epoch: texts, or else whole batches."""
    supervised = supervision(task)
    texts, labels, size = supervised.task.texts, torch.cat(list(supervised.labels)), len(supervised.labels[0])
    while True:
        if supervised.tokenizer is None:
            for i in torch.randperm(len(task.batches)).tolist():
                yield task.batches[i], supervised.labels[i]
        else:
            order = torch.randperm(len(texts)).tolist()
            ordered = batches(
                supervised.tokenizer, [texts[i] for i in order], size, supervised.max_length, labels.device
            )
            yield from zip(forward_arguments(task.model, ordered), labels[order].split(size), strict=True)
