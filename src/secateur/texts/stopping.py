"""When enough texts were scored: the units to keep would hardly change if all the others were scored too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from secateur.support.processes import from_main

CONFIDENCE = 0.95
AGREEMENT = 0.95

_AT_LEAST = 32  # texts, before the normal approximation is trusted
_GROWTH = 1.25  # of the number of texts between two looks, so that looking costs little and rarely errs
_DRAWS = 100


class Settling:
    """Follows the scores of texts that are read in random order, out of a known number, and says when to stop.

    Scores are means over texts, so the means over all texts lie around those so far as a normal distribution says
    whose covariance is that of the single texts' scores, divided by the number read and, as texts are drawn without
    replacement, times the share that is not read (finite population correction). Means are drawn from it, each is
    selected with, and `agreement` is the share of heads with the same verdict as now that 95% of the draws reach:
    with 95% confidence, at least so many heads are kept or dropped as they would be after all texts. It is settled at
    0.95.

    Heads' scores may be correlated, and any way of selecting will do. The limits: a normal distribution, at least 32
    texts, and a few looks, the earliest lucky one of which counts; each comes after a quarter more texts. Memory grows
    with the square of the number of heads and not with the texts.
    """

    def __init__(
        self,
        select: Callable[[Mapping[str, Tensor]], Tensor],
        num_texts: float,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.select, self.total, self.accelerator = select, num_texts, accelerator
        self.seen = 0
        self.agreement = 0.0
        self._next = float(_AT_LEAST)
        self._heads: dict[str, int] = {}
        self._mean = self._scatter = torch.zeros(0)
        self._random = torch.Generator().manual_seed(seed)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take the scores of more texts: for each site `[texts, heads]`, float64."""
        new = torch.cat(list(rows.values()), dim=1)
        if not self.seen:
            self._heads = {site: row.shape[1] for site, row in rows.items()}
            self._mean, self._scatter = new.new_zeros(new.shape[1]), new.new_zeros(new.shape[1], new.shape[1])
        count, mean = len(new), new.mean(dim=0)
        centred, shift = new - mean, mean - self._mean
        # Merging of two groups' means and scatter matrices, Chan et al. 1979.
        weight = self.seen * count / (self.seen + count)
        self._scatter = self._scatter + centred.T @ centred + weight * torch.outer(shift, shift)
        self._mean = self._mean + shift * count / (self.seen + count)
        self.seen += count

    def settled(self) -> bool:
        """Say whether to stop, and bring `agreement` up to date where it is time to look."""
        if self.seen >= self.total:
            self.agreement = 1.0
        elif self.seen >= self._next:
            self._next = self.seen * _GROWTH
            self.agreement = from_main(self._agreement, self.accelerator)
        return self.agreement >= AGREEMENT

    def _agreement(self) -> float:
        spread = self._scatter / (self.seen - 1) / self.seen * (1 - self.seen / self.total)
        values, vectors = torch.linalg.eigh(spread)
        noise = torch.randn(_DRAWS, len(values), generator=self._random, dtype=values.dtype)
        drawn = self._mean + noise * values.clamp(min=0).sqrt() @ vectors.T
        now = self.select(self._by_site(self._mean))
        shares = torch.stack([(self.select(self._by_site(row)) == now).double().mean() for row in drawn])
        return float(shares.quantile(1 - CONFIDENCE, interpolation="lower"))

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._heads, flat.split(list(self._heads.values())), strict=True))
