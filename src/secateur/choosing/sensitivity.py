"""Where units go: what each site alone, cut to several sizes and refitted, changes at the end of the model.

Layerwise sensitivities joined by dynamic programming, as in SPDY (Frantar and Alistarh 2022, arXiv 2201.13096), ZipLM
(Kurtić et al. 2023, arXiv 2302.04089) and K-prune (Park et al. 2024, arXiv 2308.03449).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from secateur.choosing.moments import Fit, Moments, Projection, moments_of
from secateur.choosing.prefix import Prefix
from secateur.errors import UnsupportedModelError
from secateur.settings import Cut, Reading
from secateur.sites.gating import probe
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.support.interrupts import undoing
from secateur.units.scores import Scores
from secateur.units.select import select

LEVELS = 8
"""Sizes at which a site is tried, in equal steps from what its floor leaves up."""

RIDGE = 1e-2
"""Strength of the ridge of each trial's refit, in units of the mean second moment."""

_BINS = 2000  # steps of the share that is saved, in the dynamic programme


@dataclass(frozen=True)
class Option:
    """One way to cut a part of the model: the share it saves, what it changes at the end, and the units that stay.

    `gone` names whole layers that go, by their list and their place in it now.
    """

    saved: float
    error: float
    kept: dict[str, Tensor]
    gone: tuple[tuple[str, int], ...] = ()


@torch.no_grad()
def options_of_sites(
    base: PreTrainedModel,
    sites: Mapping[str, Site],
    scores: Scores,
    prefix: Prefix,
    evaluator: EndError,
    cut: Cut,
    reading: Reading,
) -> dict[str, list[tuple[float, Tensor]]]:
    """Return, for each site, the error at the end and the units that stay, for every size, from whole to smallest.

    Units go by their scores, lowest first. The output projection is refitted to those that stay, on the batches of
    `prefix`, for as long as a size is tried: of half of a site's units others can make up for much.
    """
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for name in tqdm(sites, desc="sensitivity", disable=not reading.progress, leave=False):
        site = sites[name]
        if isinstance(site, LayerSite):
            found[name] = [(evaluator({name: row}), row) for row in _one_layer_less(site)]
            continue
        rows = sizes_of_site(scores, name, cut)
        fitted = Projection(base, site)
        moments = moments_of(base, fitted, prefix, reading)
        found[name] = [(0.0, rows[0])]
        for row in rows[1:]:
            there = row[list(site.units)]
            with _refitted(fitted, moments, there):
                found[name].append((evaluator({name: there.float()}), row))
    return found


def _one_layer_less(site: LayerSite) -> Iterator[Tensor]:
    for number in range(site.num_units):
        gate = torch.ones(site.num_units)
        gate[number] = 0
        yield gate


def sizes_of_site(scores: Scores, name: str, cut: Cut, levels: int = LEVELS) -> list[Tensor]:
    """Return the units that stay of a site, bool `[original units]`, from all of them to as few as the floor leaves.

    In so many equal steps. Of units in groups whole groups go in a plain cut, so that other sites can keep as many.
    """
    scores = scores.only([name])
    grouped = scores.num_groups[name] < scores[name].numel()
    rows: dict[int, Tensor] = {}
    for level in range(levels + 1):
        ratio = min(level / levels, 1 - 1e-9)
        row = select(scores, ratio, "ranking" if cut.plain and grouped else "uniform", cut.floor, cut.multiple)[name]
        rows.setdefault(int(row.sum()), row)
    return list(rows.values())


@undoing
def _refitted(projection: Projection, moments: Moments | None, kept: Tensor) -> Iterator[None]:
    """Refit an output projection to the units in `kept` meanwhile."""
    stays = projection.stays(kept)
    with ExitStack() as undo:
        if moments is not None:
            fit = Fit(moments, stays, projection.rows(~stays), projection.has_bias)
            undo.callback(projection.set_(*projection.refitted(fit, stays, RIDGE)))
        yield


class EndError:
    """How far gates move the last hidden states of a model: the squared difference, as a share of their variance.

    Over the tokens of the batches of `prefix` that are no padding. Layers before that of the gated site are not run
    again.
    """

    def __init__(self, base: PreTrainedModel, prefix: Prefix) -> None:
        self.base, self.prefix = base, prefix
        self.dense = [self._states(batch) for batch in prefix.batches]
        self.variance = float(torch.cat(self.dense).var(dim=0).mean())

    def __call__(self, gates: Mapping[str, Tensor]) -> float:
        """Return the error under gates of one site, `[units]`."""
        site = next(iter(gates))
        total, count = 0.0, 0
        with probe(self.base, gates=gates):
            for number, batch in enumerate(self.prefix.batches):
                with self.prefix.passing(number, site):
                    states = self._states(batch)
                total += float((states - self.dense[number]).square().sum())
                count += states.numel()
        return total / count / self.variance

    def _states(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the last hidden states of the tokens that are no padding, `[tokens, width]`."""
        states = getattr(self.base(**batch), "last_hidden_state", None)
        if states is None:
            raise UnsupportedModelError(
                f"{type(self.base).__name__} returns no last hidden states to judge sites by; take `allocation` uniform"
            )
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == states.shape[:2]:
            return states[mask.bool()].float()
        return states.flatten(0, -2).float()


def cheapest(parts: Sequence[Sequence[Option]], needed: float) -> list[Option] | None:
    """Return one option for each part so that they save `needed` together and their errors add up to least.

    By dynamic programming over what is saved, in steps of a two-thousandth of the model, rounded down. None where no
    choice saves as much.
    """
    target = int(np.ceil(needed * _BINS - 1e-9))
    best = np.full(target + 1, np.inf)
    best[0] = 0.0
    taken: list[Any] = []
    for options in parts:
        totals = np.full((len(options), target + 1), np.inf)
        for number, option in enumerate(options):
            step = int(option.saved * _BINS + 1e-9)
            moved = np.minimum(np.arange(target + 1) + step, target)
            np.minimum.at(totals[number], moved, best + option.error)
        taken.append((totals.argmin(axis=0), best))
        best = totals.min(axis=0)
    if not np.isfinite(best[target]):
        return None
    return _followed_back(parts, taken, target)


def _followed_back(parts: Sequence[Sequence[Option]], taken: Sequence[Any], target: int) -> list[Option]:
    """Return the options that led to `target`, from the last part to the first."""
    chosen: list[Option] = []
    place = target
    for options, (choices, before) in zip(reversed(parts), reversed(taken), strict=True):
        option = options[int(choices[place])]
        chosen.append(option)
        step = int(option.saved * _BINS + 1e-9)
        # At the target all that saves enough meets: the cheapest way in came from anywhere within a step of it.
        low = max(place - step, 0)
        place = low + int(before[low : place + 1].argmin()) if place == target else low
    return chosen[::-1]
