"""Collecting a sample: masks are tried, or searched for, on a frozen model."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.choosing.mask_loss import MaskLoss, MeanLoss
from secateur.choosing.search import search
from secateur.errors import InvalidInputError
from secateur.meta_training.sample import LEAVE_ONE_OUT, Sample
from secateur.models.state import evaluation_mode
from secateur.pruners.evidence import Evidence, contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner, standardised
from secateur.sites.layout import AttentionSite
from secateur.texts.batches import Batch
from secateur.units.masks import PresentMask, vector_of
from secateur.units.select import Allocation, select

_LEAST_KL = 1e-6  # below what a model in bfloat16 can tell from nothing


class TrialSet(NamedTuple):
    """Trials that drop as many heads, and are compared with each other."""

    number: int
    allocation: Allocation
    ratio: float


@dataclass(frozen=True)
class TrialConfig:
    """Which masks are tried, for each allocation and ratio.

    The scores are the log of the contributions, those of a pruner where there is one, and the mean of both. `search`:
    exchanges that a search tries, led by `guides` of the evaluators, from what the pruner chooses, or where there is
    none, the contributions. Without a search the scores' choices are tried `own` times each, as each trial is evaluated
    on another batch; `near`: masks that scores with noise choose; `spread`: standard deviation of the Gumbel noise, in
    units of the scores' own; `at_random`: masks of no scores. `leave_one_out`: whether each head is dropped alone too,
    evaluated on all batches.
    """

    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    allocations: tuple[Allocation, ...] = ("uniform", "ranking")
    search: int = 0
    guides: int = 2
    own: int = 2
    near: int = 28
    at_random: int = 5
    spread: float = 1.0
    leave_one_out: bool = False

    def passes(self, evaluators: int, with_pruner: bool) -> int:
        """Return how many times at most an evaluator looks at a mask for a sample, made with a pruner or without.

        Each trial meets one evaluator, and each set's reference all of them, but for those that lead a search: these
        meet each mask of it. Gradients, and heads dropped alone, come on top; sets whose ratio removes no head of a
        model are passed over, and a search ends early where no exchange is left.
        """
        sets, rankings = len(self.trial_sets), 3 if with_pruner else 1
        if not self.search:
            return sets * (self.own * rankings + self.near + self.at_random + evaluators)
        guides = min(self.guides, evaluators)
        return sets * (guides * (self.search + 1) + rankings + self.search + (evaluators - guides or evaluators))

    @property
    def trial_sets(self) -> list[TrialSet]:
        """Every allocation and ratio, numbered: as among all allocations, whichever are tried."""
        cells = itertools.product(("uniform", "ranking"), self.ratios)
        return [
            TrialSet(number, allocation, ratio)
            for number, (allocation, ratio) in enumerate(cells, LEAVE_ONE_OUT + 1)
            if allocation in self.allocations
        ]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    sites: Mapping[str, AttentionSite],
    batches: Sequence[Batch],
    evaluators: Sequence[MaskLoss],
    is_pair: bool,
    *,
    subject: str,
    task: str,
    config: TrialConfig,
    seed: int,
    pruner: JointPruner | None = None,
) -> Sample:
    """Make one sample from a frozen base model, batches of a task, and evaluators of masks on other batches of it.

    Each trial is evaluated by one of them, at random, and its loss is divided by that of one mask of its set, the same
    for all, with the same evaluator. So a mask cannot look good because it fits a few texts, nor because its texts are
    easy. A search is led by some of the evaluators, drawn for each set, and the masks that it tries are trials that the
    others evaluate. An evaluator may hold a copy of the model in bfloat16, which takes half of the time. `subject` and
    `task` name the model and the task. `pruner` must not have seen the task where what is fitted on the sample shall
    say something about unseen ones.
    """
    random = torch.Generator().manual_seed(seed)
    with evaluation_mode(model):
        evidence = gather_evidence(model, sites, batches, is_pair)
    rankings = [standardised(contribution_scores(evidence).double())]
    if pruner is not None:
        learned = standardised(pruner.eval()(evidence).double())
        rankings += [learned, rankings[0] + learned]
    trials = _Trials(evidence, sites, evaluators, config, random)
    for trial_set in config.trial_sets:
        trials.try_set(trial_set, rankings)
    if config.leave_one_out:
        trials.try_heads_alone()
    if not trials.masks:
        raise InvalidInputError(
            f"no head of {subject or 'the model'} can be removed at any of the ratios {config.ratios}"
        )
    return trials.sample(subject, task)


class _Trials:
    """The masks of a sample, tried in the order in which `random` is drawn from."""

    def __init__(
        self,
        evidence: Evidence,
        sites: Mapping[str, AttentionSite],
        evaluators: Sequence[MaskLoss],
        config: TrialConfig,
        random: torch.Generator,
    ) -> None:
        self.evidence, self.sites, self.evaluators = evidence, sites, evaluators
        self.config, self.random = config, random
        self.masks: list[PresentMask] = []
        self.losses: list[float] = []
        self.trial_sets: list[int] = []
        self.found: list[tuple[PresentMask, Allocation]] = []

    def try_set(self, trial_set: TrialSet, rankings: Sequence[Tensor]) -> None:
        """Try the masks of one set; scores that rank heads are `[heads]`, the last one's choice is the reference."""
        own = [self._select(scores, trial_set) for scores in rankings]
        if all(bool(row.all()) for row in own[-1].values()):
            return  # too few heads, or groups of them too large, to remove so few
        guides: list[int] = []
        if self.config.search:
            guides = torch.randperm(len(self.evaluators), generator=self.random)[: self.config.guides].tolist()
            masks = own + self._searched(own[1] if len(own) > 1 else own[0], guides, trial_set)
        else:
            masks = own * self.config.own + self._scattered(rankings, trial_set)
        others = [one for number, one in enumerate(self.evaluators) if number not in guides] or self.evaluators
        references = [max(evaluator(own[-1]), _LEAST_KL) for evaluator in others]
        for mask in masks:
            number = int(torch.randint(len(others), (1,), generator=self.random))
            self._add(mask, others[number](mask) / references[number], trial_set.number)

    def try_heads_alone(self) -> None:
        """Try each head dropped alone, evaluated on all batches."""
        heads = len(self.evidence.features)
        for head in range(heads):
            mask = PresentMask(self.evidence.split(~vector_of([head], heads)))
            self._add(mask, statistics.mean(evaluator(mask) for evaluator in self.evaluators), LEAVE_ONE_OUT)

    def sample(self, subject: str, task: str) -> Sample:
        """Return the sample of what was tried and found."""
        losses, trial_sets = torch.tensor(self.losses), torch.tensor(self.trial_sets)
        sample = Sample(subject, task, self.evidence, self._stacked(self.masks), losses, trial_sets)
        if not self.found:
            return sample
        by_site = torch.tensor([allocation == "uniform" for _, allocation in self.found])
        return replace(sample, found=self._stacked([mask for mask, _ in self.found]), by_site=by_site)

    def _searched(self, start: PresentMask, guides: Sequence[int], trial_set: TrialSet) -> list[PresentMask]:
        """Search from a mask, a pruner's own where there is one, as it learns where that falls short.

        Keeps the best mask, and returns all that were tried but the start.
        """
        loss = MeanLoss([self.evaluators[number] for number in guides])
        kv_groups = {name: self.sites[name].num_groups for name in self.evidence.heads}
        tried = search(loss, start, kv_groups, self.config.search, self.random, trial_set.allocation)
        self.found.append((min(tried, key=lambda trial: trial[1])[0], trial_set.allocation))
        return [mask for mask, _ in tried[1:]]

    def _scattered(self, rankings: Sequence[Tensor], trial_set: TrialSet) -> list[PresentMask]:
        """Return masks at random, and masks near what the scores choose."""
        level = torch.zeros(len(self.evidence.features), dtype=torch.float64)
        near = [rankings[number % len(rankings)] for number in range(self.config.near)]
        return [self._near(scores, trial_set) for scores in [level] * self.config.at_random + near]

    def _near(self, scores: Tensor, trial_set: TrialSet) -> PresentMask:
        """Select by the scores plus Gumbel noise of up to `spread` times their own spread; equal scores: at random."""
        noise = -torch.log(-torch.log(torch.rand(len(scores), generator=self.random, dtype=torch.float64)))
        scale = float(scores.std())
        if scale:
            noise = noise * scale * self.config.spread * float(torch.rand(1, generator=self.random))
        return self._select(scores + noise, trial_set)

    def _select(self, scores: Tensor, trial_set: TrialSet) -> PresentMask:
        return select(self.evidence.scores(scores, self.sites), trial_set.ratio, trial_set.allocation)

    def _add(self, mask: PresentMask, loss: float, trial_set: int) -> None:
        self.masks.append(mask)
        self.losses.append(loss)
        self.trial_sets.append(trial_set)

    def _stacked(self, masks: Sequence[PresentMask]) -> Tensor:
        return torch.stack([torch.cat([mask[name] for name in self.evidence.heads]) for mask in masks])
