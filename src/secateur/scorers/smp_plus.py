"""Beyond the paper's criterion: networks that see what heads write, and all heads together."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import SecateurWarning, invalid
from secateur.pruners.evidence import gather_evidence
from secateur.pruners.joint_network import DISTRUSTED, JointPruner, agreement, standardised
from secateur.scorers.base import Scorer, ScoringTask
from secateur.scorers.smp import read_pruner
from secateur.support.checks import is_number

SHIPPED = Path(__file__).parents[1] / "assets" / "smp-plus"
"""The joint meta-pruner that ships with secateur; its card, README.md, says how it was trained."""


class SmpPlusScorer(Scorer):
    """The joint meta-pruner's scores, from the evidence of one dense pass over all texts.

    `pruner` is a `JointPruner`, or a folder or Hub id that `JointPruner.from_pretrained` reads; by default the one that
    ships with secateur. Where its networks disagree too much to be trusted, as on kinds of models that they have not
    seen, the contribution takes their place, and a `SecateurWarning` says so; `train_joint_pruner` teaches one a model
    of yours. On a model that the pruner remembers, which the one that ships does all-MiniLM-L6-v2, half of the score is
    the share of good masks for other tasks that keep the head.

    `matching` takes the place of the pruner's own weight on heads that match words between the two texts of pairs,
    which fine-tuning needs; 0 suits representations that are used as they are.
    """

    description = "joint meta-pruner: sees contributions and redundancy, and scores all heads together"
    source = "this project, after Zhang et al. 2021 (arXiv 2011.03770)"
    passes = "1"
    texts_apart = True

    def __init__(self, pruner: JointPruner | str | Path | None = None, matching: float | None = None) -> None:
        if matching is not None and not is_number(matching, least=0):
            raise invalid("matching", "be a number from 0", matching)
        self.pruner = read_pruner(JointPruner, SHIPPED if pruner is None else pruner)
        if matching is not None:
            self.pruner = copy.copy(self.pruner)  # the one that was given keeps its own weight
            self.pruner.matching = matching

    def score(self, task: ScoringTask) -> dict[str, Tensor]:
        """Gather the evidence and score all heads at once."""
        batches = task.track(task.batches, len(task.batches), "scoring")
        special_ids = task.special_ids if self.pruner.matching else None  # matching takes maps
        evidence = gather_evidence(
            task.model, task.sites, batches, task.is_pair, task.reading.accelerator, special_ids, self.pruner.sees_maps
        )
        with torch.no_grad():
            (by_member,) = self.pruner.eval().member_scores([evidence])
            found = evidence.split(self.pruner.combine(evidence, by_member))
        agreed = float(agreement(standardised(by_member)))
        if agreed <= DISTRUSTED and self.pruner.recall(evidence) is None:
            matched = " and their matching" if self.pruner.matching and task.is_pair else ""
            message = (
                f"the networks of smp-plus disagree on this model (mean correlation {agreed:.2f}, trusted above "
                f"{DISTRUSTED:g}), as on kinds of models that they have not seen: its heads are scored by their "
                f"contribution{matched} instead; `secateur joint-train` makes one that knows it"
            )
            warnings.warn(message, SecateurWarning, stacklevel=4)
        return {name: found.get(name, torch.zeros(0)) for name in task.sites}  # a site may have been emptied before
