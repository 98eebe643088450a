"""What a meta-pruner's masks cost on texts that no step of its training sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import InvalidInputError
from secateur.meta_training.subjects import Subject
from secateur.models.state import evaluation_mode
from secateur.pruners.map_network import MetaPruner
from secateur.relations import RELATED
from secateur.sites.gating import HeadReading, probe
from secateur.texts.batches import Batch
from secateur.texts.data import Task
from secateur.units.scores import PresentScores
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


@torch.no_grad()
def held_out_kl(
    pruner: MetaPruner, subject: Subject, held_out: Sequence[HeldOut], pruning_ratio: float, max_length: int
) -> dict[str, float]:
    """Return, for each held-out task, the relational KL of the deterministic top-k mask on a model."""
    found = {}
    with evaluation_mode(pruner):
        for part in held_out:
            texts, is_pair = part.task.texts, part.task.is_pair
            calibration = subject.batches(texts[: part.calibration], _SCORED_AT_ONCE, max_length)
            mask = select(PresentScores(_summed_scores(pruner, subject, calibration, is_pair)), pruning_ratio)
            evaluation = texts[part.calibration : part.calibration + part.evaluation]
            with evaluation_mode(subject.model):
                batches = subject.batches(evaluation, _EVALUATED_AT_ONCE, max_length)
                found[part.task.name] = MaskLoss(subject.model, batches, is_pair)(mask)
    return found


def _summed_scores(pruner: MetaPruner, subject: Subject, batches: Sequence[Batch], is_pair: bool) -> dict[str, Tensor]:
    """Return the sum over texts of every head's score, `[heads]` a site."""
    sums = {site: torch.zeros(heads, dtype=torch.float64) for site, heads in subject.heads.items()}
    for batch in batches:

        def add(reading: HeadReading, batch: Batch = batch) -> None:
            assert reading.weights is not None  # asked for below
            rows = pruner.score_maps(reading.weights.float(), batch.get("attention_mask"), is_pair)
            sums[reading.site] += rows.sum(dim=0).double().cpu()

        with probe(subject.model, add, weights=True):
            subject.model(**batch)
    return sums
