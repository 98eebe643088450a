"""What a joint pruner's masks cost on texts that it was not fitted on, beside those of the plain contribution."""

from __future__ import annotations

from typing import get_args

import torch

from secateur.choosing.mask_loss import MaskLoss
from secateur.errors import InvalidInputError, invalid
from secateur.meta_training.joint_config import FEWEST_SCORED, JointTrainingConfig
from secateur.meta_training.subjects import Subject
from secateur.models.state import evaluation_mode
from secateur.pruners.evidence import contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner
from secateur.pruners.tokens import special_ids_of
from secateur.sites.attention import find_sites
from secateur.texts.data import Task
from secateur.units.select import Allocation, select

_EVALUATED = 128  # texts, at most


def check_held_out(task: Task) -> None:
    """Raise `InvalidInputError` unless the task has enough texts to measure a pruner by."""
    if len(task) < 2 * FEWEST_SCORED:
        raise InvalidInputError(
            f"held-out task {task.name} has {len(task)} texts, fewer than {2 * FEWEST_SCORED}; give more dev texts, "
            "or the file with the training texts alone"
        )


@torch.no_grad()
def held_out_losses(
    subject: Subject, task: Task, pruner: JointPruner, config: JointTrainingConfig | None = None, ratio: float = 0.5
) -> dict[Allocation, dict[str, float]]:
    """Return, for each allocation, the relational KL of the masks that the contribution and the joint pruner choose.

    `task` holds texts that the pruner was not fitted on. Drawn with the seed, `num_texts` of them at most, and no more
    than half, give the evidence; masks are evaluated on up to 128 others. Raises `InvalidInputError` for fewer than
    eight.
    """
    config = JointTrainingConfig() if config is None else config
    kinds = {"subject": Subject, "task": Task, "pruner": JointPruner, "config": JointTrainingConfig}
    for (name, kind), value in zip(kinds.items(), (subject, task, pruner, config), strict=True):
        if not isinstance(value, kind):
            raise invalid(name, f"be a {kind.__name__}", value)
    check_held_out(task)
    scored = min(config.num_texts, len(task) // 2)
    texts = task.head(scored + _EVALUATED, config.seed).texts
    model, sites = subject.model, find_sites(subject.model)
    batches, held_out = (
        subject.batches(part, config.batch_size, config.max_length) for part in (texts[:scored], texts[scored:])
    )
    with evaluation_mode(model):
        special_ids = special_ids_of(subject.tokenizer)
        evidence = gather_evidence(model, sites, batches, task.is_pair, special_ids=special_ids, maps=pruner.sees_maps)
        loss = MaskLoss(model, held_out, task.is_pair)
        rankings = {"contribution": contribution_scores(evidence), "joint_pruner": pruner.eval()(evidence)}
        return {
            allocation: {
                name: loss(select(evidence.scores(values, sites), ratio, allocation))
                for name, values in rankings.items()
            }
            for allocation in get_args(Allocation)
        }
