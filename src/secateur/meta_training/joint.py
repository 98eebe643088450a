"""Teaching the joint pruner which masks are good: try some once, or search for the best, then learn from them.

A sample is some texts of a task with a frozen model: the evidence of one dense pass, trials, masks with their
relational KL on other texts of the task, and, where a search was asked for, the best masks that it found. Scores are
fitted so that the sum over the heads that a trial drops explains the log of its KL among masks that drop as many, and
to tell the heads that the found masks keep from those that they drop.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.choosing.search import MaskLoss, MeanLoss, search
from secateur.errors import CheckpointError, InvalidInputError, invalid
from secateur.models.state import evaluation_mode
from secateur.pruners.evidence import FEATURES, Evidence, contribution_scores, gather_evidence
from secateur.pruners.joint_network import JointPruner, standardised
from secateur.pruners.known_models import KnownModel
from secateur.sites.layout import AttentionSite
from secateur.support.files import write_bytes
from secateur.units.masks import PresentMask
from secateur.units.scores import PresentScores
from secateur.units.select import Allocation, select

LEAVE_ONE_OUT = 0
"""The group of trials that each drop a single head; the others are numbered from 1, one a allocation and ratio."""

BESIDE_FOUND: dict[str, Any] = {"prior": 0.0, "matching": 1.3}
"""What stands beside networks that found masks taught, as `JointPruner` takes it.

They do not need the contribution, which makes a third of the score of those that trials alone teach; so matching's
weight, 2 beside both, is two thirds too.
"""

_LEAST_KL = 1e-6  # below what a judge in bfloat16 can tell from nothing


@dataclass(frozen=True, eq=False)
class Sample:
    """Evidence, and trials: `masks` bool `[trials, heads]`, `losses` `[trials]` ≥ 0, `groups` `[trials]`.

    Losses are comparable within a group alone. `found` bool `[found, heads]` are the best masks of searches, of which
    `by_site` bool `[found]` tells those that had to leave as many heads at every site; None where there was no search.
    """

    subject: str
    task: str
    evidence: Evidence
    masks: Tensor
    losses: Tensor
    groups: Tensor
    found: Tensor | None = None
    by_site: Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole or not at all."""
        tensors = {
            "features": self.evidence.features,
            "likeness": self.evidence.likeness,
            "masks": self.masks.to(torch.uint8),
            "losses": self.losses,
            "groups": self.groups,
        }
        if self.evidence.fingerprints is not None:
            tensors["fingerprints"] = self.evidence.fingerprints
        if self.found is not None and self.by_site is not None:
            tensors |= {"found": self.found.to(torch.uint8), "by_site": self.by_site.to(torch.uint8)}
        about = {
            "subject": self.subject,
            "task": self.task,
            "heads": json.dumps(self.evidence.heads),
            "columns": ",".join(FEATURES),
        }
        write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, about))

    @classmethod
    def load(cls, path: str | Path) -> Sample:
        """Read what `save` wrote. Raises `CheckpointError` for anything else, and for evidence of other columns."""
        try:
            with safe_open(path, "pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} holds no sample: {error}; remove it, and it is collected again") from None
        if (about or {}).get("columns") != ",".join(FEATURES):
            raise CheckpointError(f"{path} holds evidence of another version; remove it, and it is collected again")
        heads, fingerprints = json.loads(about["heads"]), tensors.get("fingerprints")
        evidence = Evidence(tensors["features"], tensors["likeness"], heads, fingerprints=fingerprints)
        masks = tensors["masks"].bool()
        found, by_site = (tensors[name].bool() if name in tensors else None for name in ("found", "by_site"))
        of = about["subject"], about["task"]
        return cls(*of, evidence, masks, tensors["losses"], tensors["groups"], found, by_site)


@dataclass(frozen=True)
class TrialConfig:
    """Which masks are tried, for each allocation and ratio.

    The scores are the log of the contributions, those of a pruner where there is one, and the mean of both. `search`:
    exchanges that a search tries, led by `guides` of the judges, from what the pruner chooses, or where there is none,
    the contributions. Without a search the scores' choices are tried `own` times each, as each trial is judged on
    another batch; `near`: masks that scores with noise choose; `spread`: standard deviation of the Gumbel noise, in
    units of the scores' own; `at_random`: masks of no scores. `leave_one_out`: whether each head is dropped alone too,
    judged on all batches.
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

    def passes(self, rankings: int, judges: int) -> int:
        """Return how many times at most a judge looks at a mask for a sample.

        Each trial meets one judge, and each group's reference all of them, but for those that lead a search: these meet
        each mask of it. Gradients, and heads dropped alone, come on top; groups whose ratio removes no head of a model
        are passed over, and a search ends early where no exchange is left.
        """
        if not self.search:
            return len(self.groups) * (self.own * rankings + self.near + self.at_random + judges)
        guides = min(self.guides, judges)
        return len(self.groups) * (guides * (self.search + 1) + rankings + self.search + (judges - guides or judges))

    @property
    def groups(self) -> list[tuple[int, Allocation, float]]:
        """Every group's number, allocation and ratio."""
        cells = itertools.product(("uniform", "ranking"), self.ratios)
        return [
            (n, allocation, ratio)
            for n, (allocation, ratio) in enumerate(cells, LEAVE_ONE_OUT + 1)
            if allocation in self.allocations
        ]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    sites: Mapping[str, AttentionSite],
    batches: Sequence[Mapping[str, Any]],
    judges: Sequence[MaskLoss],
    is_pair: bool,
    subject: str,
    task: str,
    config: TrialConfig,
    seed: int,
    pruner: JointPruner | None = None,
    staying: Mapping[str, Tensor] | None = None,
) -> Sample:
    """Make one sample from a frozen base model, batches of a task, and judges of masks on other batches of it.

    Each trial is judged by one of the judges, at random, and its loss is divided by that of one mask of its group, the
    same for all, with the same judge. So a mask cannot look good because it fits a few texts, nor because its texts are
    easy. A search is led by some of the judges, drawn for each group, and the masks on its way are trials that the
    others judge. A judge may hold a copy of the model in bfloat16, which takes half of the time. `pruner` must not have
    seen the task where what is fitted on the sample shall say something about unseen ones.
    """
    random = torch.Generator().manual_seed(seed)
    with evaluation_mode(model):
        evidence = gather_evidence(model, sites, batches, is_pair)
    rankings = [standardised(contribution_scores(evidence).double())]
    if pruner is not None:
        learned = standardised(pruner.eval()(evidence).double())
        rankings += [learned, rankings[0] + learned]
    trials, found = _trials(judges, evidence, rankings, sites, config, random)
    if config.leave_one_out:
        heads = torch.arange(len(evidence.features))
        alone = [PresentMask(evidence.split(heads != head)) for head in heads]
        trials += [(mask, statistics.mean(judge(mask) for judge in judges), LEAVE_ONE_OUT) for mask in alone]
    if not trials:
        raise InvalidInputError(
            f"no head of {subject or 'the model'} can be removed at any of the ratios {config.ratios}"
        )
    masks = _stacked(evidence, [mask for mask, _, _ in trials])
    losses, groups = torch.tensor([loss for _, loss, _ in trials]), torch.tensor([group for _, _, group in trials])
    sample = Sample(subject, task, evidence, masks, losses, groups)
    if not found:
        return sample
    by_site = torch.tensor([allocation == "uniform" for _, allocation in found])
    return replace(sample, found=_stacked(evidence, [mask for mask, _ in found]), by_site=by_site)


def _stacked(evidence: Evidence, masks: Sequence[PresentMask]) -> Tensor:
    return torch.stack([torch.cat([mask[name] for name in evidence.heads]) for mask in masks])


def _trials(
    judges: Sequence[MaskLoss],
    evidence: Evidence,
    rankings: Sequence[Tensor],
    sites: Mapping[str, AttentionSite],
    config: TrialConfig,
    random: torch.Generator,
) -> tuple[list[tuple[PresentMask, float, int]], list[tuple[PresentMask, Allocation]]]:
    """Judge each group's masks, and return them, and the best that searches found."""
    kv_heads = {name: sites[name].num_groups for name in evidence.heads}
    level = torch.zeros(len(evidence.features), dtype=torch.float64)
    around = [rankings[i % len(rankings)] for i in range(config.near)]
    trials, found = [], []
    for number, allocation, ratio in config.groups:
        own = [select(PresentScores(evidence.split(scores), kv_heads), ratio, allocation) for scores in rankings]
        if all(bool(row.all()) for row in own[-1].values()):
            continue  # too few heads, or groups of them too large, to remove so few
        guides: list[int] = []
        if config.search:
            guides = torch.randperm(len(judges), generator=random)[: config.guides].tolist()
            start = own[1] if len(own) > 1 else own[0]  # a pruner learns where its own choice falls short
            way = search(MeanLoss([judges[i] for i in guides]), start, kv_heads, config.search, random, allocation)
            found.append((min(way, key=lambda trial: trial[1])[0], allocation))
            masks = own + [mask for mask, _ in way[1:]]
        else:
            masks = own * config.own
            masks += [
                _near(scores, evidence, kv_heads, ratio, allocation, config.spread, random)
                for scores in [level] * config.at_random + around
            ]
        others = [judge for i, judge in enumerate(judges) if i not in guides] or judges
        reference = [max(judge(own[-1]), _LEAST_KL) for judge in others]
        for mask in masks:
            judge = int(torch.randint(len(others), (1,), generator=random))
            trials.append((mask, others[judge](mask) / reference[judge], number))
    return trials, found


def _near(
    scores: Tensor,
    evidence: Evidence,
    groups: Mapping[str, int],
    ratio: float,
    allocation: Allocation,
    spread: float,
    random: torch.Generator,
) -> PresentMask:
    """Select by the scores plus Gumbel noise of up to `spread` times their own spread; equal scores: at random."""
    noise = -torch.log(-torch.log(torch.rand(len(scores), generator=random, dtype=torch.float64)))
    scale = float(scores.std())
    noise = noise if scale == 0 else noise * scale * spread * float(torch.rand(1, generator=random))
    return select(PresentScores(evidence.split(scores + noise), dict(groups)), ratio, allocation)


@dataclass(frozen=True)
class FitConfig:
    """Settings of the regression.

    `groups`: which trials alone teach, as numbered in `Sample`; with None all but heads dropped alone do, and the masks
    that searches found. `jitter`: noise on the standardised evidence, against learning single samples by heart.
    """

    epochs: int = 80
    batch_size: int = 8
    learning_rate: float = 5e-3
    weight_decay: float = 0.05
    jitter: float = 0.1
    groups: tuple[int, ...] | None = None
    seed: int = 0


def trial_loss(scores: Tensor, sample: Sample, groups: Sequence[int] | None = None) -> Tensor:
    """Return how badly scores explain a sample's trials: 0 = perfectly, 1 = not at all, 2 = the wrong way.

    For each group of trials: 1 - the correlation of log KL with the sum of the dropped heads' scores. Averaged over
    groups. Neither the level nor the scale of a sample's losses counts, which differ from model to model.
    """
    chosen = [int(g) for g in sample.groups.unique() if (g != LEAVE_ONE_OUT if groups is None else int(g) in groups)]
    if not chosen:
        raise invalid("groups", f"name groups of the sample's, {sample.groups.unique().tolist()}", groups)
    losses = []
    for group in chosen:
        rows = sample.groups == group
        found = sample.losses[rows].to(scores).clamp(min=1e-9).log()
        predicted = (~sample.masks[rows]).to(scores) @ scores
        found, predicted = found - found.mean(), predicted - predicted.mean()
        losses.append(1 - (found * predicted).sum() / (found.norm() * predicted.norm()).clamp(min=1e-9))
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
    of_site = both @ (sites / sites.sum(dim=0)) @ sites.T
    kept, given = both - torch.where(sample.by_site[:, None], of_site, both.mean(dim=-1, keepdim=True))
    return (1 - nn.functional.cosine_similarity(kept, given, dim=-1, eps=1e-9)).mean()


def lesson(scores: Tensor, sample: Sample, groups: Sequence[int] | None = None) -> Tensor:
    """Return what a fit lowers: the trial loss, and where masks were found and no groups named, the imitation loss too.

    The found masks say which heads go together; trials on the way to them, which of the heads hardly matter.
    """
    loss = trial_loss(scores, sample, groups)
    return loss if sample.found is None or groups is not None else loss + imitation_loss(scores, sample)


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
        losses = []
        for numbers in torch.randperm(len(samples), generator=random).split(config.batch_size):
            chosen = [samples[number] for number in numbers.tolist()]
            noisy = [_jittered(sample.evidence, config.jitter, random) for sample in chosen]
            loss = torch.stack(
                [
                    lesson(scores, sample, config.groups)
                    for judged, sample in zip(pruner.judge_all(noisy), chosen, strict=True)
                    for scores in judged
                ]
            ).mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        history.append(statistics.mean(losses))
    pruner.eval()
    return history


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
        kept = found_over_the_whole_model(sample).float().mean(dim=0)
        own = next((own for of, own in by_model if _are_same(of, fingerprints)), None)
        if own is None:
            by_model.append((fingerprints, own := []))
        own.append((sample.evidence, kept))
    for _, own in by_model:
        pruner.known.append(KnownModel.of(own))


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Are these fingerprints of one model, whatever devices they were computed on?"""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=0)


def found_over_the_whole_model(sample: Sample) -> Tensor:
    """Return the masks that searches found with heads ranked over the whole model, bool `[ratios, heads]`.

    Raises `InvalidInputError` where there are none.
    """
    if sample.found is None or sample.by_site is None or bool(sample.by_site.all()):
        raise invalid("samples", "hold masks that a search found over the whole model", sample.task)
    return sample.found[~sample.by_site]


def _jittered(evidence: Evidence, spread: float, random: torch.Generator) -> Evidence:
    noise = torch.randn(evidence.features.shape, generator=random) * spread * evidence.features.std(dim=0, correction=0)
    return Evidence(evidence.features + noise, evidence.likeness, evidence.heads)
