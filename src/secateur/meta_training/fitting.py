"""Fitting the joint pruner to samples: scores that explain what trials cost, and tell which heads found masks keep.

Scores are fitted so that the sum over the heads that a trial drops explains the log of its KL among masks that drop as
many, and so that the heads that found masks keep score higher than those that they drop.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import invalid
from secateur.meta_training.sample import LEAVE_ONE_OUT, Sample
from secateur.pruners.evidence import Evidence
from secateur.pruners.joint_network import JointPruner

BESIDE_FOUND: dict[str, Any] = {"prior": 0.0, "matching": 1.3}
"""What stands beside networks that are fitted on found masks, as `JointPruner` takes it.

They do not need the contribution, which makes a third of the score of those fitted on trials alone; so matching's
weight, 2 beside both, is two thirds too.
"""


@dataclass(frozen=True)
class FitConfig:
    """Settings of the regression.

    `trial_sets`: which trials alone count, as numbered in `Sample`; with None all but heads dropped alone do, and the
    masks that searches found. `jitter`: noise on the standardised evidence, against learning single samples by heart.
    """

    epochs: int = 80
    batch_size: int = 8
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    jitter: float = 0.1
    trial_sets: tuple[int, ...] | None = None
    seed: int = 0


def trial_loss(scores: Tensor, sample: Sample, trial_sets: Sequence[int] | None = None) -> Tensor:
    """Return how badly scores explain a sample's trials: 0 = perfectly, 1 = not at all, 2 = the wrong way.

    For each set of trials: 1 - the correlation of log KL with the sum of the dropped heads' scores. Averaged over
    sets. Neither the level nor the scale of a sample's losses counts, which differ from model to model.
    """
    there = [int(number) for number in sample.trial_sets.unique()]
    chosen = [n for n in there if (n != LEAVE_ONE_OUT if trial_sets is None else n in trial_sets)]
    if not chosen:
        raise invalid("trial_sets", f"name sets of the sample's, {there}", trial_sets)
    losses = []
    for number in chosen:
        rows = sample.trial_sets == number
        cost = sample.losses[rows].to(scores).clamp(min=1e-9).log()
        predicted = (~sample.masks[rows]).to(scores) @ scores
        cost, predicted = cost - cost.mean(), predicted - predicted.mean()
        losses.append(1 - (cost * predicted).sum() / (cost.norm() * predicted.norm()).clamp(min=1e-9))
    return torch.stack(losses).mean()


def imitation_loss(scores: Tensor, sample: Sample) -> Tensor:
    """Return how badly scores tell which heads the found masks keep: 0 = perfectly, 1 = not at all, 2 = the wrong way.

    For each mask: 1 - the correlation of the scores with being kept, over all heads, or over those of each site where
    the mask had to leave as many at every site. Averaged over masks. Neither level nor scale of the scores counts.
    Raises `InvalidInputError` where nothing was found.
    """
    if sample.found is None or sample.by_site is None:
        raise invalid("sample", "hold masks that a search found", sample.found)
    both = torch.stack([sample.found.to(scores), scores.expand(sample.found.shape)])
    sites = nn.functional.one_hot(sample.evidence.site_numbers).to(scores)
    site_means = both @ (sites / sites.sum(dim=0)) @ sites.T
    kept, scored = both - torch.where(sample.by_site[:, None], site_means, both.mean(dim=-1, keepdim=True))
    return (1 - nn.functional.cosine_similarity(kept, scored, dim=-1, eps=1e-9)).mean()


def training_loss(scores: Tensor, sample: Sample, trial_sets: Sequence[int] | None = None) -> Tensor:
    """Return what a fit lowers: the trial loss, and where masks were found and no sets named, the imitation loss too.

    The found masks say which heads go together; trials on the way to them, which of the heads hardly matter.
    """
    loss = trial_loss(scores, sample, trial_sets)
    return loss if sample.found is None or trial_sets is not None else loss + imitation_loss(scores, sample)


def fit(pruner: JointPruner, samples: Sequence[Sample], config: FitConfig | None = None) -> list[float]:
    """Train the pruner in place, each member by itself, and return the mean loss of every epoch."""
    config = config or FitConfig()
    if not samples:
        raise invalid("samples", "hold at least one", [])
    random = torch.Generator().manual_seed(config.seed)
    pruner.train()
    optimizer = torch.optim.AdamW(pruner.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * -(-len(samples) // config.batch_size)
    )
    history = []
    for _ in range(config.epochs):
        of_epoch = []
        for numbers in torch.randperm(len(samples), generator=random).split(config.batch_size):
            loss = _batch_loss(pruner, [samples[number] for number in numbers.tolist()], config, random)
            of_epoch.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        history.append(statistics.mean(of_epoch))
    pruner.eval()
    return history


def _batch_loss(pruner: JointPruner, samples: Sequence[Sample], config: FitConfig, random: torch.Generator) -> Tensor:
    """Return the mean over samples and members."""
    noisy = [_jittered(sample.evidence, config.jitter, random) for sample in samples]
    losses = [
        training_loss(scores, sample, config.trial_sets)
        for by_member, sample in zip(pruner.member_scores(noisy), samples, strict=True)
        for scores in by_member
    ]
    return torch.stack(losses).mean()


def _jittered(evidence: Evidence, spread: float, random: torch.Generator) -> Evidence:
    noise = torch.randn(evidence.features.shape, generator=random) * spread * evidence.features.std(dim=0, correction=0)
    return Evidence(evidence.features + noise, evidence.likeness, evidence.heads)
