"""What one dense pass tells about every head, in numbers that do not depend on the model's width.

Per head: how much it writes into the residual stream and how that differs between texts, in which direction compared
with its site's sum and with the text representations, how much of it the other heads of its site could say, what its
attention map looks like, and how deep it lies. Per pair of heads of a site: how alike their contributions are.

Everything is a sum over texts, or a comparison of texts with each other: neither padding nor the order or size of
batches changes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import invalid
from secateur.pruners.tokens import in_decoder
from secateur.pruners.word_matches import matching
from secateur.pruners.writes import contribution_norms, output_weights
from secateur.relations import by_first_token, represent
from secateur.sites.gating import HeadReading, probe
from secateur.sites.layout import AttentionSite
from secateur.support.processes import in_order

_TINY = 1e-12
FINGERPRINT = 32  # numbers that tell a head from others
_BLOCKS = 4  # five eighths of a full product's work; with more, the products are too narrow to run fast

MAP_FEATURES = ("entropy", "confidence", "to first", "to last", "to self", "to previous", "to next")
SIZE_FEATURES = ("size", "variation", "variation of the first token", "relevance", "relevance of the first token")
DIRECTION_FEATURES = ("alignment", "alignment of the first token", "cosine with site", "share of site")
REDUNDANCY_FEATURES = ("unexplained", "unexplained between texts", "nearest head")
LEVEL_FEATURES = ("site level", "site size", "site variation")
PLACE_FEATURES = ("depth", "height", "heads", "is pair")

FEATURES = SIZE_FEATURES + DIRECTION_FEATURES + REDUNDANCY_FEATURES + MAP_FEATURES + LEVEL_FEATURES + PLACE_FEATURES
"""The columns of `Evidence.features`.

size: log of the mean norm of the contribution (the `contribution` scorer), less its mean over the site; variation: the
same of how far a text's mean contribution is from the mean over texts; relevance: log of the covariance (unbiased HSIC)
between a head's contributions to texts and their representations, less the site's mean. "of the first token": the
contribution at the first token instead of the mean over tokens. alignment: unbiased linear CKA of the two. cosine
with site, share of site: of the head's contribution with and in the sum over its site's heads. unexplained: log of the
share of a head's contribution that is no linear combination of the other heads', over tokens or between texts;
nearest head: the largest cosine with another head. entropy is divided by its largest value. site level: the site's
mean of log sizes; site size, site variation: log of the norm of the sum over the site's heads; these three less their
mean over sites. depth: 0 first site, 1 last; height: 1 / sites; heads: of the site, / 16.
"""

SIZE, LEVEL = FEATURES.index("size"), FEATURES.index("site level")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a dense pass over some texts tells about a model's heads.

    `features` `[heads, features]` over all sites in order, finite; `likeness` `[heads, heads]`, the cosine of two
    heads' contributions over all tokens in [-1, 1], 0 between sites; `heads` maps each site to its number of heads.
    `matching` `[heads]` in [0, 1] is how much a head matches words between the two texts of a pair (the `matching`
    scorer's), None where that was not asked for. `fingerprints` `[heads, FINGERPRINT]` is no evidence of what a head
    does, but of which it is: see `fingerprints_of`; None where nobody is to know.
    """

    features: Tensor
    likeness: Tensor
    heads: dict[str, int]
    matching: Tensor | None = None
    fingerprints: Tensor | None = None

    @property
    def site_numbers(self) -> Tensor:
        """The number of each head's site, `[heads]`."""
        counts = torch.tensor(list(self.heads.values()))
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector over all heads, `[heads]`, into one for each site."""
        return dict(zip(self.heads, values.split(list(self.heads.values())), strict=True))


@torch.no_grad()
def gather_evidence(
    model: PreTrainedModel,
    sites: Mapping[str, AttentionSite],
    batches: Iterable[Mapping[str, Any]],
    is_pair: bool,
    accelerator: Accelerator | None = None,
    special_ids: frozenset[int] | None = None,
    maps: bool = True,
) -> Evidence:
    """Run `model` (a base model in evaluation mode) once over the batches and return the evidence.

    `special_ids` are the tokens that stand for no word; with None the matching is not gathered. Without `maps` their
    columns are 0, and attention maps are made for the matching of pairs alone.
    The processes of `accelerator`, if any, run a share of the batches each and all get the evidence. Raises
    `InvalidInputError` where there are fewer than four texts: relations between texts are part of it.
    """
    first_token = by_first_token(model, is_pair)
    unmatched = {name for name in sites if not is_pair or in_decoder(model, name)}
    gathered = {name: _Site(output_weights(model, site)) for name, site in sites.items() if site.num_units}

    def run(batch: Mapping[str, Any]) -> tuple[dict[str, list[_Sums]], Tensor]:
        found: dict[str, list[_Sums]] = defaultdict(list)

        def keep(reading: HeadReading) -> None:
            if reading.site in gathered:  # an earlier pruning may have left a site without heads
                own_ids = None if reading.site in unmatched else special_ids
                sums = gathered[reading.site].read(reading, batch, own_ids, maps)
                found[reading.site].append(sums)

        with probe(model, keep, weights=maps or (is_pair and special_ids is not None)):
            representation = represent(model, model(**batch), batch, first_token).float()
        return dict(found), representation.cpu()

    representations = []
    for found, representation in in_order(run, batches, accelerator):
        for name, calls in found.items():
            for call, sums in enumerate(calls):
                gathered[name].add(sums, call)
        representations.append(representation)
    targets = torch.cat(representations) if representations else torch.zeros(0, 1)
    if len(targets) < 4:
        raise invalid("texts", "be at least 4, as this scorer compares them with each other", len(targets))
    targets = torch.nn.functional.normalize(targets - targets.mean(dim=0), dim=1)
    kernel = targets @ targets.T
    rows = [site.features(kernel) for site in gathered.values()]
    sizes = torch.stack([row.totals for row in rows])
    sizes = sizes - sizes.mean(dim=0)
    features = []
    for number, row in enumerate(rows):
        heads = len(row.columns)
        levels_and_place = torch.tensor(
            [*sizes[number].tolist(), number / max(1, len(rows) - 1), 1 / len(rows), heads / 16, float(is_pair)]
        )
        features.append(torch.cat([row.columns, levels_and_place.expand(heads, -1)], dim=1))
    likeness = torch.block_diag(*(row.likeness for row in rows))
    heads_of = {name: len(row.columns) for name, row in zip(gathered, rows, strict=True)}
    matched = None if special_ids is None else torch.cat([row.matching for row in rows])
    fingerprints = torch.cat([site.fingerprints for site in gathered.values()])
    return Evidence(torch.cat(features), likeness, heads_of, matched, fingerprints)


def contribution_scores(evidence: Evidence) -> Tensor:
    """Return the log of every head's contribution norm, `[heads]`, less its mean over the model's sites."""
    return evidence.features[:, SIZE] + evidence.features[:, LEVEL]


def fingerprints_of(weights: Tensor) -> Tensor:
    """Return what tells heads from others, whatever they read: `[heads, FINGERPRINT]`.

    `weights` are their parts of the output projection, `[heads, width, model width]`; the norms of the rows, over again
    where there are fewer.
    """
    norms = weights.norm(dim=2)
    return norms[:, torch.arange(FINGERPRINT, device=norms.device) % norms.shape[1]].cpu()


@dataclass(frozen=True, eq=False)
class _Row:
    """One site's share of the evidence.

    `columns` `[heads, features less levels and place]`; `likeness` `[heads, heads]`; `totals` `[3]`, which become the
    levels once their mean over sites is taken off; `matching` `[heads]`.
    """

    columns: Tensor
    likeness: Tensor
    totals: Tensor
    matching: Tensor


@dataclass(frozen=True, eq=False)
class _Sums:
    """What one site shows of one batch, on the CPU, so that another process can have computed it.

    Sums over texts: `over_tokens` `[heads, heads]`, `norms` and `matching` `[heads]`, `maps` `[heads, MAP_FEATURES]`.
    By text, all heads side by side: `means` over tokens and `firsts`, of the first token, `[texts, heads · width]`.
    """

    over_tokens: Tensor
    norms: Tensor
    maps: Tensor
    means: Tensor
    firsts: Tensor
    matching: Tensor


class _Site:
    """Sums over texts for one site; a site that runs several times in a pass (shared weights) keeps its calls apart."""

    def __init__(self, weights: Tensor) -> None:
        self.heads, self.width = weights.shape[:2]
        self.fingerprints = fingerprints_of(weights)
        flat = weights.flatten(0, 1)
        self.products = flat @ flat.T  # of rows of the output projection: [heads · width, heads · width]
        self.grams = weights @ weights.transpose(1, 2)  # the same of each head's own: [heads, width, width]
        self.over_tokens = torch.zeros(self.heads, self.heads, device=weights.device)
        self.norms = torch.zeros(self.heads, device=weights.device)
        self.maps = torch.zeros(self.heads, len(MAP_FEATURES), device=weights.device)
        self.matching = torch.zeros(self.heads)
        self.texts = 0
        self.means: dict[int, list[Tensor]] = defaultdict(list)
        self.firsts: dict[int, list[Tensor]] = defaultdict(list)

    def read(
        self, reading: HeadReading, batch: Mapping[str, Any], special_ids: frozenset[int] | None, maps: bool
    ) -> _Sums:
        """Sum up one batch; with `special_ids` None nothing is matched, as in single texts."""
        outputs, mask = reading.outputs.float(), batch.get("attention_mask")
        texts, tokens = outputs.shape[:2]
        real = torch.ones(texts, tokens, device=outputs.device)
        if mask is not None and mask.shape == (texts, tokens):
            real = mask.to(real)
        share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        flat = outputs.flatten(2)
        # Each token counts as much as its text's length leaves it.
        moments = _second_moments((flat * share.unsqueeze(-1).sqrt()).flatten(0, 1))
        norms = contribution_norms(outputs, self.grams)
        matched, statistics = torch.zeros(self.heads), torch.zeros(self.heads, len(MAP_FEATURES))
        if reading.weights is not None:  # asked for above
            if special_ids is not None:
                matched = matching(reading.weights, batch, special_ids).sum(dim=0)
            if maps:
                statistics = _map_statistics(reading.weights.float(), real).sum(dim=0)
        return _Sums(
            self._by_heads(moments.to(self.products.device)).cpu(),
            (norms * share.unsqueeze(-1)).sum(dim=(0, 1)).cpu(),
            statistics.cpu(),
            torch.einsum("bti,bt->bi", flat, share).cpu(),
            flat[torch.arange(texts), real.argmax(dim=1)].cpu(),
            matched.cpu(),
        )

    def add(self, sums: _Sums, call: int) -> None:
        """Take one batch's sums, of the call with that number."""
        device = self.products.device
        self.over_tokens += sums.over_tokens.to(device)
        self.norms += sums.norms.to(device)
        self.maps += sums.maps.to(device)
        self.means[call].append(sums.means.to(device))
        self.firsts[call].append(sums.firsts.to(device))
        self.matching += sums.matching
        self.texts += len(sums.means)

    def _by_heads(self, moments: Tensor) -> Tensor:
        """Turn second moments of all heads' outputs into inner products of their contributions, `[heads, heads]`."""
        return (moments * self.products).view(self.heads, self.width, self.heads, self.width).sum(dim=(1, 3))

    def features(self, target: Tensor) -> _Row:
        """Put the sums together; `target` is the kernel of the texts' representations `[texts, texts]`."""
        target = target.to(self.products.device)
        over_tokens = self.over_tokens / self.texts
        size = (self.norms / self.texts).clamp(min=_TINY).log()
        variation, relevance, alignment, between = self._between_texts(self.means, target)
        first_variation, first_relevance, first_alignment, _ = self._between_texts(self.firsts, target)
        likeness = _cosines(over_tokens)
        total = over_tokens.sum().clamp(min=_TINY)
        with_site = over_tokens.sum(dim=1)
        columns = [
            *(_relative(x) for x in (size, variation, first_variation, relevance, first_relevance)),
            alignment,
            first_alignment,
            with_site / (over_tokens.diagonal().clamp(min=_TINY) * total).sqrt(),
            (with_site / total * self.heads).clamp(-5, 5),
            _unexplained(over_tokens),
            _unexplained(between),
            (likeness - 2 * torch.eye(self.heads, device=likeness.device)).amax(dim=1).clamp(min=-1),
            *(self.maps / self.texts).T,
        ]
        totals = torch.stack([size.mean(), total.log() / 2, between.sum().clamp(min=_TINY).log() / 2])
        return _Row(torch.stack(columns, dim=1).cpu(), likeness.cpu(), totals.cpu(), self.matching / self.texts)

    def _between_texts(self, kept: Mapping[int, list[Tensor]], target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return variation, relevance and alignment of each head, and the heads' products between texts."""
        own = self.products.view(self.heads, self.width, self.heads, self.width).diagonal(dim1=0, dim2=2)
        kernels, between = [], torch.zeros_like(self.over_tokens)
        for rows in kept.values():
            flat = torch.cat(rows)
            flat = flat - flat.mean(dim=0)
            between += self._by_heads(flat.T @ flat) / len(flat)
            outputs = flat.view(len(flat), self.heads, self.width)
            kernels.append(torch.einsum("ahi,ijh,bhj->hab", outputs, own, outputs))
        kernel = torch.stack(kernels).sum(dim=0)
        variation = kernel.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=_TINY).log() / 2
        common = unbiased_hsic(kernel, target)
        own_size = unbiased_hsic(kernel, kernel).clamp(min=_TINY).sqrt()
        target_size = unbiased_hsic(target, target).clamp(min=_TINY).sqrt()
        alignment = (common / (own_size * target_size)).clamp(-1, 1)
        # Chance can make it negative: a head that bears on nothing then has a hundredth of its site's mean.
        relevance = (common / target_size).clamp(min=_TINY)
        return variation, relevance.clamp(min=1e-2 * float(relevance.mean())).log() / 2, alignment, between


def _second_moments(rows: Tensor) -> Tensor:
    """Return `rows.T @ rows`, `[width, width]`: what lies below the diagonal is copied from above, block by block."""
    width = rows.shape[1]
    step = -(-width // _BLOCKS)
    moments = rows.new_zeros(width, width)
    for start in range(0, width, step):
        end = start + step
        moments[start:end, start:] = rows[:, start:end].T @ rows[:, start:]
        moments[end:, start:end] = moments[start:end, end:].T
    return moments


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """Return the unbiased estimate of HSIC of kernels `[…, texts, texts]` (Song et al. 2012, JMLR 13, eq. 5).

    The plain estimate grows as texts get fewer; this one does not. There must be 4 texts or more.
    """
    n = first.shape[-1]
    off = 1 - torch.eye(n, device=first.device)
    first, second = first * off, second * off
    rows = (first.sum(dim=-1) * second.sum(dim=-1)).sum(dim=-1)
    sums = first.sum(dim=(-2, -1)) * second.sum(dim=(-2, -1))
    trace = (first * second).sum(dim=(-2, -1))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def _map_statistics(weights: Tensor, real: Tensor) -> Tensor:
    """Return each text's mean over real queries of what its rows look like: `[batch, heads, MAP_FEATURES]`."""
    texts, _, queries, keys = weights.shape
    rows = real if queries == real.shape[1] else torch.ones(texts, queries, device=weights.device)
    share = rows / rows.sum(dim=1, keepdim=True).clamp(min=1)
    lengths = (real.sum(dim=1) if keys == real.shape[1] else torch.full((texts,), float(keys))).to(weights)

    def mean(values: Tensor) -> Tensor:
        return torch.einsum("bhq,bq->bh", values, share)

    # Weights of 0 count 0. PyTorch's functions for x log x are two to three times as slow on a CPU.
    entropy = -weights.clamp(min=torch.finfo(weights.dtype).tiny).log().mul_(weights).sum(dim=-1)
    start = real.argmax(dim=1) if keys == real.shape[1] else torch.zeros_like(lengths)  # not 0 where padded on the left
    first, last = (
        place.long().view(-1, 1, 1, 1).expand(-1, weights.shape[1], queries, 1)
        for place in (start, (start + lengths - 1).clamp(min=0))
    )
    zero = torch.zeros_like(weights[..., 0])
    square = queries == keys
    previous = torch.nn.functional.pad(weights.diagonal(-1, 2, 3), (1, 0)) if square else zero
    following = torch.nn.functional.pad(weights.diagonal(1, 2, 3), (0, 1)) if square else zero
    return torch.stack(
        [
            mean(entropy) / lengths.clamp(min=2).log().view(-1, 1),
            mean(weights.amax(dim=-1)),
            mean(weights.gather(-1, first).squeeze(-1)),
            mean(weights.gather(-1, last).squeeze(-1)),
            mean(weights.diagonal(0, 2, 3) if square else zero),
            mean(previous),
            mean(following),
        ],
        dim=-1,
    )


def _relative(values: Tensor) -> Tensor:
    return (values - values.mean()).clamp(-6, 6)


def _cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().clamp(min=_TINY).sqrt()
    return (products / norms / norms.unsqueeze(1)).clamp(-1, 1)


def _unexplained(products: Tensor) -> Tensor:
    """Return log of the share of each head that is no combination of the others, from the inverse of their cosines."""
    cosines = _cosines(products).double()
    ridge = cosines + 1e-3 * torch.eye(len(cosines), dtype=torch.float64, device=cosines.device)
    return (-torch.linalg.inv(ridge).diagonal().clamp(min=1).log()).clamp(min=-7).float()
