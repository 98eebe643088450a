"""One site's share of the evidence: sums over texts, and what its heads' numbers are once all texts are in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruners.features import MAP_FEATURES
from secateur.pruners.kernels import TINY, cosines, second_moments, unbiased_hsic, unexplained
from secateur.pruners.map_statistics import map_statistics
from secateur.pruners.word_matches import matching
from secateur.pruners.writes import contribution_norms, fingerprints_of
from secateur.sites.gating import HeadReading
from secateur.texts.batches import Batch


@dataclass(frozen=True, eq=False)
class SiteEvidence:
    """One site's share of the evidence.

    `columns` `[heads, features less levels and place]`; `likeness` `[heads, heads]`; `totals` `[3]`, which become the
    levels once their mean over sites is taken off; `matching` `[heads]`; `fingerprints` `[heads, FINGERPRINT]`.
    """

    columns: Tensor
    likeness: Tensor
    totals: Tensor
    matching: Tensor
    fingerprints: Tensor


@dataclass(frozen=True, eq=False)
class BatchSums:
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


@dataclass(frozen=True, eq=False)
class _BetweenTexts:
    """How contributions differ between texts: three numbers a head, `[heads]`, and inner products `[heads, heads]`."""

    variation: Tensor
    relevance: Tensor
    alignment: Tensor
    products: Tensor


class SiteSums:
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

    def read(self, reading: HeadReading, batch: Batch, special_ids: frozenset[int] | None, maps: bool) -> BatchSums:
        """Sum up one batch; with `special_ids` None nothing is matched, as in single texts."""
        outputs, mask = reading.outputs.float(), batch.get("attention_mask")
        texts, tokens = outputs.shape[:2]
        real = torch.ones(texts, tokens, device=outputs.device)
        if mask is not None and mask.shape == (texts, tokens):
            real = mask.to(real)
        share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        flat = outputs.flatten(2)
        # Each token counts as much as its text's length leaves it.
        moments = second_moments((flat * share.unsqueeze(-1).sqrt()).flatten(0, 1))
        norms = contribution_norms(outputs, self.grams)
        matched, statistics = torch.zeros(self.heads), torch.zeros(self.heads, len(MAP_FEATURES))
        if reading.weights is not None:  # where the pass makes attention maps
            if special_ids is not None:
                matched = matching(reading.weights, batch, special_ids).sum(dim=0)
            if maps:
                statistics = map_statistics(reading.weights.float(), real).sum(dim=0)
        return BatchSums(
            over_tokens=self._by_heads(moments.to(self.products.device)).cpu(),
            norms=(norms * share.unsqueeze(-1)).sum(dim=(0, 1)).cpu(),
            maps=statistics.cpu(),
            means=torch.einsum("bti,bt->bi", flat, share).cpu(),
            firsts=flat[torch.arange(texts), real.argmax(dim=1)].cpu(),
            matching=matched.cpu(),
        )

    def add(self, sums: BatchSums, call: int) -> None:
        """Take one batch's sums, of the call with that number."""
        device = self.products.device
        self.over_tokens += sums.over_tokens.to(device)
        self.norms += sums.norms.to(device)
        self.maps += sums.maps.to(device)
        self.means[call].append(sums.means.to(device))
        self.firsts[call].append(sums.firsts.to(device))
        self.matching += sums.matching
        self.texts += len(sums.means)

    def evidence(self, kernel: Tensor) -> SiteEvidence:
        """Put the sums together; `kernel` is that of the texts' representations `[texts, texts]`."""
        kernel = kernel.to(self.products.device)
        over_tokens = self.over_tokens / self.texts
        size = (self.norms / self.texts).clamp(min=TINY).log()
        mean, first = self._between_texts(self.means, kernel), self._between_texts(self.firsts, kernel)
        likeness = cosines(over_tokens)
        total = over_tokens.sum().clamp(min=TINY)
        with_site = over_tokens.sum(dim=1)
        columns = [  # in the order of FEATURES
            *(_relative(x) for x in (size, mean.variation, first.variation, mean.relevance, first.relevance)),
            mean.alignment,
            first.alignment,
            with_site / (over_tokens.diagonal().clamp(min=TINY) * total).sqrt(),
            (with_site / total * self.heads).clamp(-5, 5),
            unexplained(over_tokens),
            unexplained(mean.products),
            (likeness - 2 * torch.eye(self.heads, device=likeness.device)).amax(dim=1).clamp(min=-1),
            *(self.maps / self.texts).T,
        ]
        totals = torch.stack([size.mean(), total.log() / 2, mean.products.sum().clamp(min=TINY).log() / 2])
        return SiteEvidence(
            columns=torch.stack(columns, dim=1).cpu(),
            likeness=likeness.cpu(),
            totals=totals.cpu(),
            matching=self.matching / self.texts,
            fingerprints=self.fingerprints,
        )

    def _by_heads(self, moments: Tensor) -> Tensor:
        """Turn second moments of all heads' outputs into inner products of their contributions, `[heads, heads]`."""
        return (moments * self.products).view(self.heads, self.width, self.heads, self.width).sum(dim=(1, 3))

    def _between_texts(self, by_call: Mapping[int, list[Tensor]], target: Tensor) -> _BetweenTexts:
        """Compare texts by each head's contributions; `target` is the kernel of their representations."""
        own = self.products.view(self.heads, self.width, self.heads, self.width).diagonal(dim1=0, dim2=2)
        kernels, products = [], torch.zeros_like(self.over_tokens)
        for rows in by_call.values():
            flat = torch.cat(rows)
            flat = flat - flat.mean(dim=0)
            products += self._by_heads(flat.T @ flat) / len(flat)
            outputs = flat.view(len(flat), self.heads, self.width)
            kernels.append(torch.einsum("ahi,ijh,bhj->hab", outputs, own, outputs))
        kernel = torch.stack(kernels).sum(dim=0)
        common = unbiased_hsic(kernel, target)
        own_size = unbiased_hsic(kernel, kernel).clamp(min=TINY).sqrt()
        target_size = unbiased_hsic(target, target).clamp(min=TINY).sqrt()
        # Chance can make it negative: a head that bears on nothing then has a hundredth of its site's mean.
        relevance = (common / target_size).clamp(min=TINY)
        return _BetweenTexts(
            variation=kernel.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=TINY).log() / 2,
            relevance=relevance.clamp(min=1e-2 * float(relevance.mean())).log() / 2,
            alignment=(common / (own_size * target_size)).clamp(-1, 1),
            products=products,
        )


def _relative(values: Tensor) -> Tensor:
    return (values - values.mean()).clamp(-6, 6)
