"""What a meta-pruner's masks cost on texts that no step of its training sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import InvalidInputError
from secateur.meta_training.subjects import Subject
from secateur.models.state import evaluation_mode
from secateur.pruners.map_network import MetaPruner
from secateur.relations import RELATED
from secateur.scorers.base import Scorer
from secateur.scorers.contribution import ContributionScorer
from secateur.scorers.score import score
from secateur.scorers.smp import SmpScorer
from secateur.settings import Reading
from secateur.texts.calibration import PreparedModel
from secateur.texts.data import Task
from secateur.units.select import select

_SCORED_AT_ONCE, _EVALUATED_AT_ONCE = 16, 32  # texts a batch


@dataclass(frozen=True)
class HeldOut:
    """Texts of a task that no step sees: the first `calibration` are scored, the next `evaluation` tell the loss."""

    task: Task
    calibration: int = 32
    evaluation: int = 96

    def __post_init__(self) -> None:
        fewest = self.calibration + RELATED
        if len(self.task) < fewest:
            raise InvalidInputError(f"held-out task {self.task.name} has {len(self.task)} texts, fewer than {fewest}")


class Judge:
    """The relational KL of masks on held-out texts of every task, on every model that a pruner learns on.

    Masks are those that a pruning would make: of the sites that can lose heads, with their groups.
    """

    def __init__(
        self, subjects: Sequence[Subject], held_out: Sequence[HeldOut], pruning_ratio: float, max_length: int
    ) -> None:
        self.pruning_ratio, self.reading = pruning_ratio, Reading(batch_size=_SCORED_AT_ONCE, max_length=max_length)
        self._cases = []
        for number, subject in enumerate(subjects, 1):
            prepared = PreparedModel(subject.model, subject.tokenizer, self.reading)
            for part in held_out:
                name = part.task.name if len(subjects) == 1 else f"{part.task.name}, model {number}"
                texts = part.task.texts[part.calibration : part.calibration + part.evaluation]
                batches = subject.batches(texts, _EVALUATED_AT_ONCE, max_length)
                loss = MaskLoss(prepared.base, batches, part.task.is_pair)
                self._cases.append((name, prepared, part.task.texts[: part.calibration], loss))

    def of_pruner(self, pruner: MetaPruner) -> dict[str, float]:
        """Return the relational KL of a meta-pruner's masks, for each task and, where there are several, model."""
        with evaluation_mode(pruner):
            return self._losses(SmpScorer(pruner))

    def of_contribution(self) -> dict[str, float]:
        """Return the same of `contribution`, which is not trained."""
        return self._losses(ContributionScorer())

    @torch.no_grad()
    def _losses(self, scorer: Scorer) -> dict[str, float]:
        found = {}
        for name, prepared, calibration, loss in self._cases:
            mask = select(score(prepared, calibration, scorer, reading=self.reading), self.pruning_ratio)
            with evaluation_mode(prepared.base):
                found[name] = loss(mask.present(prepared.sites))
        return found
