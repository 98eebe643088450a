"""Having a joint pruner remember the models of its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.meta_training.sample import Sample
from secateur.pruners.evidence import Evidence
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.known_models import KnownModel


def remember(pruner: JointPruner, samples: Sequence[Sample]) -> None:
    """Have the pruner remember, of each model of the samples, which heads the masks keep that searches found.

    Samples of the same fingerprints are of one model. Raises `InvalidInputError` for samples without fingerprints or
    without found masks over the whole model.
    """
    by_model: list[tuple[Tensor, list[tuple[Evidence, Tensor]]]] = []
    for sample in samples:
        fingerprints = sample.evidence.fingerprints
        if fingerprints is None:
            raise invalid("samples", "hold fingerprints of the model's heads", sample.task)
        # Masks that had to keep as many heads at every site say less of what each is worth to the model.
        kept = sample.found_by_ranking.float().mean(dim=0)
        own = next((own for known, own in by_model if _are_same(known, fingerprints)), None)
        if own is None:
            by_model.append((fingerprints, own := []))
        own.append((sample.evidence, kept))
    for _, own in by_model:
        pruner.known.append(KnownModel.of(own))


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Are these fingerprints of one model, whatever devices they were computed on?"""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=0)
