"""The joint meta-pruner: scores all heads of a model together, from evidence that does not depend on its width."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from secateur.errors import invalid
from secateur.pruners.evidence import Evidence, contribution_scores
from secateur.pruners.features import DEPTH, EVIDENCE_KINDS, FEATURES, LEVEL, MAP_FEATURES, SIZE
from secateur.pruners.known_models import KnownModel
from secateur.pruners.member_network import MemberNetwork
from secateur.pruners.word_matches import MATCH_WEIGHT
from secateur.pruners.writes import FINGERPRINT
from secateur.support.checks import check_flag, check_whole, is_number

LEFT_OUT = ("maps", "place")
"""Kinds that networks do not see unless told: without maps attention stays fused, and place says which model it is."""

MOST_BLOCKS, MOST_NUMBERS = 1_000, 100_000_000
"""Caps for what a config.json asks for: over all members, and with what is remembered."""

DISTRUSTED, TRUSTED = 0.8, 0.95  # mean correlation between members


class JointPruner(nn.Module, PyTorchModelHubMixin, library_name="secateur", license="apache-2.0"):
    """Several networks that score all heads of a model together, beside the heads' contributions.

    The score of a head is `prior` times the log of its contribution norm plus the mean of what the `members` make of
    it, each standardised over the model's heads; higher = keep. Members see the same and are fitted from different
    starts. What is fitted on trials alone gets other things wrong on tasks that it has not seen than the contribution
    does, so that the mean of both is better than each; beside a fit on found masks it adds nothing, and `prior` is 0
    in the one that ships. Where they disagree with each other, as on models unlike those that they were fitted on, the
    contribution takes their place: see `trust`. `matching` times log(1 + 8 · the head's matching) is added for pairs of
    texts, as the `matching` scorer counts it: what fine-tuning on pairs needs, and trials of masks on the frozen model
    do not show. A new network adds nothing: on single texts it ranks as the `contribution` scorer does.

    On a model that it remembers, half of the score before matching is the share of good masks for other tasks that
    keep the head, standardised too (`KnownModel`). `remembered`: each such model's numbers of heads and of samples.

    A member is a set attention over the heads; no positions, so heads of a site may come in any order. Each head starts
    as its evidence, each kind of number standardised over the model's heads, in a `width`-dimensional vector; `layers`
    blocks of attention (with a learned bias for pairs of heads: same site, likeness of their contributions, difference
    in depth) and a small feed-forward network follow.

    `joint=False` scores each head alone; `without` names kinds of evidence to leave out (see `EVIDENCE_KINDS`).
    `from_pretrained`, `save_pretrained` and `push_to_hub` use safetensors and a config.json.
    """

    used: Tensor

    def __init__(
        self,
        width: int = 48,
        layers: int = 2,
        attention_heads: int = 4,
        joint: bool = True,
        without: tuple[str, ...] = LEFT_OUT,
        members: int = 4,
        prior: float = 0.5,
        matching: float = 2.0,
        remembered: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        sizes = {"width": width, "layers": layers, "attention_heads": attention_heads, "members": members}
        _check_sizes(sizes)
        _check_remembered(remembered)
        _check_total(sizes, remembered)
        check_flag("joint", joint)
        _check_kinds(without)
        for name, weight in (("prior", prior), ("matching", matching)):
            if not is_number(weight, least=0):
                raise invalid(name, "be a number from 0", weight)
        left_out = {name for kind in without for name in EVIDENCE_KINDS[kind]}
        self.register_buffer("used", torch.tensor([float(name not in left_out) for name in FEATURES]))
        self.members = nn.ModuleList(MemberNetwork(width, layers, attention_heads, joint) for _ in range(members))
        self.prior, self.matching = prior, matching
        self.known = nn.ModuleList(KnownModel(*model) for model in remembered)

    @property
    def sees_maps(self) -> bool:
        """Whether the networks see what attention maps look like."""
        return any(float(self.used[FEATURES.index(name)]) for name in MAP_FEATURES)

    def forward(self, evidence: Evidence) -> Tensor:
        """Return a score for each head over all sites, `[heads]`, higher = keep."""
        return self.score_all([evidence])[0]

    def score_all(self, many: Sequence[Evidence]) -> list[Tensor]:
        """Return what `forward` does for each of several models or sets of texts, at once."""
        return [self.combine(one, scores) for one, scores in zip(many, self.member_scores(many), strict=True)]

    def combine(self, evidence: Evidence, member_scores: Tensor) -> Tensor:
        """Return each head's score, `[heads]`, from those that each member gives it, `[members, heads]`."""
        members = standardised(member_scores)
        contribution = standardised(contribution_scores(evidence).to(member_scores))
        sure = trust(members)
        learned = sure * members.mean(dim=0) + (1 - sure) * contribution
        score = self.prior * contribution + learned
        kept = self.recall(evidence)
        if kept is not None:
            score = (standardised(score) + standardised(kept.to(score))) / 2
        return score + self.matching * matching_scores(evidence).to(score)

    def recall(self, evidence: Evidence) -> Tensor | None:
        """Return the share of good masks that keep each head, `[heads]`; None for a model that is not remembered.

        Of relatives, as a model and what it was fine-tuned to, the closest counts.
        """
        known = [cast("KnownModel", model) for model in self.known]
        for model in sorted(known, key=lambda model: model.likeness(evidence), reverse=True):
            kept = model.recall(evidence)
            if kept is not None:
                return kept
        return None

    def member_scores(self, many: Sequence[Evidence]) -> list[Tensor]:
        """Return the score that each member gives each head, `[members, heads]`, for each of several models."""
        found: dict[int, Tensor] = {}
        by_heads: dict[int, list[int]] = defaultdict(list)
        for number, one in enumerate(many):
            by_heads[len(one.features)].append(number)
        for numbers in by_heads.values():  # models with as many heads go through the networks side by side
            found.update(zip(numbers, self._run_members([many[number] for number in numbers]), strict=True))
        return [found[number] for number in range(len(many))]

    def _run_members(self, many: Sequence[Evidence]) -> Tensor:
        """Return `[models, members, heads]` for models with as many heads each."""
        device = self.used.device
        features = torch.stack([one.features for one in many]).to(device)
        sites = torch.stack([one.site_numbers for one in many]).to(device)
        likeness = torch.stack([one.likeness for one in many]).to(device)
        depth = features[..., DEPTH]
        pair_features = torch.stack(  # as PAIR_FEATURES counts them
            [
                (sites.unsqueeze(1) == sites.unsqueeze(2)).to(features),
                likeness,
                likeness.square(),
                (depth.unsqueeze(1) - depth.unsqueeze(2)).abs(),
            ],
            dim=1,
        )
        relative = standardised(features.transpose(1, 2), least=1e-3).transpose(1, 2)
        seen = relative.clamp(-5, 5) * self.used
        sizes, levels = (features[..., column] * self.used[column] for column in (SIZE, LEVEL))
        return torch.stack([member(seen, pair_features, sizes, levels) for member in self.members], dim=1)

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin writes what the constructor was given; these may have been set since.
        sizes = [list(cast("KnownModel", model).kept.shape[::-1]) for model in self.known]
        now = {"members": len(self.members), "prior": self.prior, "matching": self.matching, "remembered": sizes}
        self._hub_mixin_config = {**cast("dict[str, Any]", self._hub_mixin_config), **now}
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, **options: Any) -> JointPruner:
        # The mixin prints where it reads from; standard output belongs to results. Unless told, it takes weights that
        # fit in part, as those of earlier versions would.
        with contextlib.redirect_stdout(io.StringIO()):
            return super()._from_pretrained(**{**options, "strict": True})


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        check_whole(name, value, 1, 4096)
    if sizes["width"] % sizes["attention_heads"]:
        raise invalid("width", f"be a multiple of the {sizes['attention_heads']} attention heads", sizes["width"])


def _check_total(sizes: Mapping[str, int], remembered: Sequence[Sequence[int]]) -> None:
    """Raise `InvalidInputError` for a network that would not fit into memory, before any of it is made."""
    weights = sizes["members"] * (sizes["layers"] * 8 * sizes["width"] ** 2 + sizes["width"] * len(FEATURES))
    numbers = weights + sum(heads * (FINGERPRINT + 2 * samples) for heads, samples in remembered)
    # Not only weights take memory: a block without many is a dozen modules of Python's.
    if numbers > MOST_NUMBERS or sizes["members"] * sizes["layers"] > MOST_BLOCKS:
        rule = f"make a network of at most {MOST_BLOCKS} blocks and {MOST_NUMBERS} numbers"
        raise invalid("members, layers, width and remembered", rule, f"about {numbers} numbers")


def _check_kinds(without: Any) -> None:
    if isinstance(without, str) or not isinstance(without, Sequence):
        raise invalid("without", "be a list of kinds of evidence", without)
    for kind in without:
        if kind not in EVIDENCE_KINDS:
            raise invalid("without", f"name kinds among {', '.join(EVIDENCE_KINDS)}", kind)


def _check_remembered(remembered: Any) -> None:
    rule = "be a list of each model's numbers of heads and of samples"
    if isinstance(remembered, str) or not isinstance(remembered, Sequence):
        raise invalid("remembered", rule, remembered)
    for sizes in remembered:
        if isinstance(sizes, str) or not isinstance(sizes, Sequence) or len(sizes) != 2:
            raise invalid("remembered", rule, remembered)
        for number in sizes:
            check_whole("remembered", number, 1, 16384)


def trust(members: Tensor) -> Tensor:
    """Return how far to go by the members' scores `[members, heads]`, standardised over heads: from 0 to 1.

    Networks that are fitted alike agree where they have learned something, and disagree where they guess (deep
    ensembles: Lakshminarayanan et al. 2017, arXiv 1612.01474): 0 up to a mean correlation between members of 0.8, 1
    from 0.95, straight in between. One member is always trusted.
    """
    return ((agreement(members) - DISTRUSTED) / (TRUSTED - DISTRUSTED)).clamp(0, 1)


def agreement(members: Tensor) -> Tensor:
    """Return the mean correlation between two members' scores `[members, heads]`, standardised; 1 for one member."""
    count, heads = members.shape
    if count == 1:
        return members.new_ones(())
    correlations = members @ members.T / heads
    return (correlations.sum() - correlations.diagonal().sum()) / (count * (count - 1))


def matching_scores(evidence: Evidence) -> Tensor:
    """Return log(1 + 8 · matching) of every head, `[heads]` ≥ 0; zeros where it is not known."""
    if evidence.matching is None:
        return torch.zeros(len(evidence.features))
    return (MATCH_WEIGHT * evidence.matching).log1p()


def standardised(scores: Tensor, least: float = 1e-6) -> Tensor:
    """Shift and scale scores `[…, heads]` to mean 0 and standard deviation 1; a spread below `least` stays below 1."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return centred / centred.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=least)
