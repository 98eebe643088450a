"""One choice for every site, by what it changes at the end of the model and what it saves."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from secateur.choosing.budget import BudgetedSelection
from secateur.choosing.prefix import Prefix, layer_of
from secateur.choosing.sensitivity import EndError, Option, cheapest, options_of_sites
from secateur.errors import invalid
from secateur.models.state import evaluation_mode, held, weights_change
from secateur.settings import Budget, Cut, Reading
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.texts.calibration import PreparedModel
from secateur.texts.examples import Example, source_of
from secateur.units.masks import Mask, is_within, layers_gone, original_vector
from secateur.units.scores import Scores

Measured = dict[str, list[tuple[float, Tensor]]]
"""Site → the error at the end and the units that stay, for each size; of a list the error without each layer."""

JUDGES = 4
"""One text of so many judges sizes, and is not fitted on."""

FEWEST = 2 * JUDGES
"""Texts that sites are measured on at least."""


class SensitivitySelection(BudgetedSelection):
    """Finds for a model how many units each site keeps within a budget, so that the end of the model changes least.

    Which units of a site these are say the scores. Sites are measured alone, and their errors add up (see
    `options_of_sites`, `cheapest`). A layer, where layers may go, goes with all that is in it or stays with what its
    sites choose. A budget for one kind of units is kept by its sites alone, and what they save counts towards one that
    counts all.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        cut: Cut,
        texts: Sequence[Example],
        reading: Reading,
        sites: Mapping[str, Site] | None = None,
    ) -> None:
        sites = prepared.sites_of(cut.kinds) if sites is None else sites
        super().__init__(prepared.model, cut, reading.progress, sites)
        if len(texts) < FEWEST:
            raise invalid(source_of(texts), f"be at least {FEWEST} with allocation 'sensitivity'", len(texts))
        self.prepared, self.texts, self.reading = prepared, texts, reading

    def select(self, scores: Scores) -> tuple[Mask, float]:
        """Return the mask, and the share of the heads, or of the first kind of units there is, that goes."""
        mask, _ = self.choose(scores, self.measure(scores))
        return mask, 1 - self._units_left(self.cut.kinds[0], mask)

    def at(self, budget: Budget) -> SensitivitySelection:
        """Return the same for another limit of the budget that counts all units."""
        other = copy.copy(self)
        other.cut = replace(self.cut, budget=[*self.own.values(), budget])
        other.joint = budget
        return other

    def choose(self, scores: Scores, measured: Measured) -> tuple[Mask, float]:
        """Return the mask that keeps within the budget, and the sum of the errors of what it drops."""
        scores = self.cut.may_go(scores)
        chosen: list[Option] = []
        for kind, budget in self.own.items():
            names = [name for name in measured if self.sites[name].kind == kind]
            parts = [self._alone(name, measured[name], budget) for name in names]
            chosen += self._choose(parts, budget, scores, 1 - budget.limit)
        if self.joint is not None:
            saved = self._saved(self._rows(chosen), self.joint)
            names = [name for name in measured if self.sites[name].kind not in self.own and not is_within(name, saved)]
            needed = max(0.0, 1 - self.joint.limit - sum(saved.values()))
            chosen += self._choose(self._parts(names, measured, self.joint, saved), self.joint, scores, needed)
        return self._mask(chosen, scores), sum(option.error for option in chosen)

    def measure(self, scores: Scores) -> Measured:
        """Return what every site with scores costs the end at every size; a layer that must stay, without end."""
        return self._measure(self.cut.may_go(scores))

    def _measure(self, scores: Scores) -> Measured:
        base, size = self.prepared.base, self.reading.batch_size
        judges = self.texts[::JUDGES]
        fitted = [text for number, text in enumerate(self.texts) if number % JUDGES]
        size = max(1, min(size, len(fitted) // 2))  # the moments are of two halves
        with (
            held(base), weights_change(base), evaluation_mode(base), torch.inference_mode(False), torch.no_grad(),
        ):  # fmt: skip
            lists, of = self.prepared.lists, self.prepared.batches
            evaluator = EndError(base, Prefix(base, list(of(judges, self.reading.batch_size)), lists))
            sites = {name: self.sites[name] for name in scores}
            prefix = Prefix(base, list(of(fitted, size)), lists)
            found = options_of_sites(base, sites, scores, prefix, evaluator, self.cut, self.reading)
        for name, units in scores.staying.items():
            for number in map(self.sites[name].units.index, units):
                found[name][number] = (math.inf, found[name][number][1])
        return found

    def _saved(self, rows: Mapping[str, Tensor], budget: Budget) -> dict[str, float]:
        """Return the share that what is chosen already saves, by site, and by layer where one goes whole."""
        kept = {name: row[list(self.sites[name].units)] for name, row in rows.items()}
        chosen = {name: self.sites[name] for name in kept}
        saved = {path: self.share_of_layer(budget, path) for path in layers_gone(chosen, kept)}
        others = [name for name in kept if self.sites[name].kind != LayerSite.kind and not is_within(name, saved)]
        return saved | {name: self.share_of_site(budget, name, kept[name]) for name in others}

    def _choose(self, parts: list[list[Option]], budget: Budget, scores: Scores, needed: float) -> list[Option]:
        """Return one option for each part, so that `needed` is saved."""
        chosen = cheapest(parts, needed)
        if chosen is None:
            share = partial(self._units_left, budget.quantity) if budget.quantity in self.own else self.share
            raise self.out_of_reach(scores, budget, share)
        return chosen

    def _mask(self, chosen: Sequence[Option], scores: Scores) -> Mask:
        """Return the units that stay, of the sites that the options are about, in the order of the scores."""
        rows = self._rows(chosen)
        return Mask({name: rows[name] for name in scores if name in rows})

    def _rows(self, chosen: Sequence[Option]) -> dict[str, Tensor]:
        rows = {name: row for option in chosen for name, row in option.kept.items()}
        for name, number in (place for option in chosen for place in option.gone):
            rows.setdefault(name, original_vector(self.sites[name]))[self.sites[name].units[number]] = False
        return rows

    def _alone(self, name: str, measured: Sequence[tuple[float, Tensor]], budget: Budget) -> list[Option]:
        """Return the options of one site."""
        site = self.sites[name]
        if isinstance(site, LayerSite):
            return self._layers_alone(site, measured)
        return [
            Option(self.share_of_site(budget, name, row[list(site.units)]), error, {name: row})
            for error, row in measured
        ]

    def _layers_alone(self, site: LayerSite, measured: Sequence[tuple[float, Tensor]]) -> list[Option]:
        """Return options that take out layers of a list, those that change least first."""
        errors = [error for error, _ in measured]
        order = sorted(range(len(errors)), key=errors.__getitem__)
        options = []
        for count in range(len(order) - max(self.cut.floor, 1) + 1):
            gone = order[:count]
            places = tuple((site.name, number) for number in gone)
            options.append(Option(count / len(order), sum(errors[number] for number in gone), {}, places))
        return options

    def _parts(
        self,
        names: Sequence[str],
        measured: Mapping[str, Sequence[tuple[float, Tensor]]],
        budget: Budget,
        saved: Mapping[str, float],
    ) -> list[list[Option]]:
        """Return the parts of the model that choose for themselves: layers that may go, and single sites elsewhere.

        `saved` has the shares that sites save already, which a layer that goes cannot save again.
        """
        lists = {name: site for name in names if isinstance(site := self.sites[name], LayerSite)}
        inside: dict[tuple[str, int], list[list[Option]]] = {
            (name, number): [] for name, site in lists.items() for number in range(site.num_units)
        }
        parts: list[list[Option]] = []
        for name in names:
            place = layer_of(name, lists)
            if name not in lists:
                (parts if place is None else inside[place]).append(self._alone(name, measured[name], budget))
        for (name, number), of_sites in inside.items():
            gone = ((name, number),)
            path = f"{name}.{number}"
            already = sum(share for site, share in saved.items() if is_within(site, [path]))
            without = Option(self.share_of_layer(budget, path) - already, measured[name][number][0], {}, gone)
            parts.append([*map(together, itertools.product(*of_sites)), without])
        return parts


def together(options: Sequence[Option]) -> Option:
    """Return several options as one."""
    kept = {name: row for option in options for name, row in option.kept.items()}
    gone = tuple(place for option in options for place in option.gone)
    return Option(sum(option.saved for option in options), sum(option.error for option in options), kept, gone)
