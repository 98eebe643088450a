"""The best cut that a config can say: one number of units for all sites of a stack, and fewer layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from secateur.choosing.allocation import Measured, SensitivitySelection, together
from secateur.choosing.prefix import layer_of
from secateur.choosing.sensitivity import LEVELS, Option, cheapest, sizes_of_site
from secateur.errors import InvalidInputError, invalid
from secateur.models.base_model import base_of
from secateur.removal.plain import can_be_plain, family_of
from secateur.sites.layers import LayerSite
from secateur.units.masks import Mask
from secateur.units.scores import Scores

_STEPS = 4  # numbers of neurons that are tried for each one measured


@dataclass(frozen=True)
class Stack:
    """Sites that keep as many units as each other, and how many that can be: what the config can say."""

    sites: tuple[str, ...]
    numbers: tuple[int, ...]


class PlainSelection(SensitivitySelection):
    """Finds for a model how many units all sites of a stack keep within a budget, and which layers.

    Stacks are the sites whose number of units one config says together, which is found by trying; where none does, as
    of heads whose size follows from their number, they stay whole. Which units go at a site say the scores. The errors
    of the sites and layers alone add up, as in `SensitivitySelection`, and every number of layers is tried with every
    number of units. A budget for one kind of units holds for each stack, and for each list of layers.
    """

    def measure(self, scores: Scores) -> Measured:
        """Return what every site of a stack, and every layer, costs the end; widths between those measured too."""
        scores = self.cut.may_go(scores)
        self.stacks = self._stacks(scores)
        lists = [name for name in scores if isinstance(self.sites[name], LayerSite)]
        names = [*lists, *(name for stack in self.stacks for name in stack.sites)]
        self._check_said({self.sites[name].kind for name in names})
        measured = self._measure(scores.only(names))
        self.stacks = [self._filled(stack, scores, measured) for stack in self.stacks]
        return measured

    def _filled(self, stack: Stack, scores: Scores, measured: Measured) -> Stack:
        """Add numbers of neurons between those measured, with errors between theirs: one step is much of a model."""
        first = stack.sites[0]
        if self.sites[first].kind != "neurons" or len(stack.numbers) < len(measured[first]):
            return stack
        for name in stack.sites:
            counts = [int(row.sum()) for _, row in reversed(measured[name])]
            errors = [error for error, _ in reversed(measured[name])]
            rows = sizes_of_site(scores, name, self.cut, _STEPS * LEVELS)
            measured[name] = [(float(np.interp(int(row.sum()), counts, errors)), row) for row in rows]
        return Stack(stack.sites, tuple(int(row.sum()) for _, row in measured[first]))

    def choose(self, scores: Scores, measured: Measured) -> tuple[Mask, float]:
        """Return the mask that keeps within the budget, and the sum of the errors of what it drops."""
        parts = [self._options(stacks, lists, measured) for stacks, lists in self._parts_of(measured)]
        chosen = cheapest(parts, 0.0 if self.joint is None else 1 - self.joint.limit) if all(parts) else None
        if chosen is None:
            raise self._too_much(parts)
        return self._mask(chosen, scores), sum(option.error for option in chosen)

    def _stacks(self, scores: Scores) -> list[Stack]:
        """Return families of sites that can lose units by themselves, and of each kind all other families together."""
        families: dict[tuple[str, str], list[str]] = {}
        for name, site in self.sites.items():
            if not isinstance(site, LayerSite):
                families.setdefault((site.kind, family_of(name)), []).append(name)
        found: list[Stack] = []
        others: dict[str, list[list[str]]] = {}
        for (kind, _), names in families.items():
            stack = self._stack(names, scores)
            if len(stack.numbers) > 1:
                found.append(stack)
            else:
                others.setdefault(kind, []).append(names)
        more = [self._stack([*itertools.chain(*left)], scores) for left in others.values() if len(left) > 1]
        return [*found, *(stack for stack in more if len(stack.numbers) > 1)]

    def _stack(self, names: Sequence[str], scores: Scores) -> Stack:
        """Return how many units these sites can keep together, most of all first."""
        there = {self.sites[name].num_units for name in names}
        if len(there) > 1 or any(name not in scores for name in names):
            return Stack(tuple(names), ())
        sizes = {name: {int(row.sum()): row for row in sizes_of_site(scores, name, self.cut)} for name in names}
        shared = sorted(set.intersection(*map(set, sizes.values())), reverse=True)

        @cache
        def can_be(number: int) -> bool:
            mask = Mask({name: sizes[name][number] for name in names})
            return number in there or can_be_plain(self.prepared.model, self.sites, mask)

        if not any(map(can_be, {shared[len(shared) // 2], shared[-1]})):  # the rest will not either
            shared = []
        return Stack(tuple(names), tuple(filter(can_be, shared)))

    def _parts_of(self, measured: Measured) -> list[tuple[list[Stack], list[str]]]:
        """Return stacks and lists of layers in parts that choose for themselves, as no site lies in two of them."""
        lists = {name: site for name in measured if isinstance(site := self.sites[name], LayerSite)}
        parts: list[tuple[list[Stack], list[str]]] = [([], [name]) for name in lists]
        for stack in self.stacks:
            within = {place[0] for name in stack.sites if (place := layer_of(name, lists)) is not None}
            linked = [part for part in parts if within & set(part[1])]
            parts = [part for part in parts if part not in linked]
            stacks, names = ([*itertools.chain(*half)] for half in zip(([stack], []), *linked, strict=True))
            parts.append((stacks, names))
        return parts

    def _options(self, stacks: Sequence[Stack], lists: Sequence[str], measured: Measured) -> list[Option]:
        """Return the ways to cut a part, of which none saves less and costs as much as another."""
        budget = self.joint or self.cut.budgets[0]
        names = [name for stack in stacks for name in stack.sites]
        alone = {
            name: {int(one.kept[name].sum()): one for one in self._alone(name, measured[name], budget)}
            for name in names
        }
        best: list[Option] = []
        for numbers in itertools.product(*map(self._within_own, stacks)):
            layers: dict[tuple[str, int] | None, list[Option]] = {}
            for stack, number in zip(stacks, numbers, strict=True):
                for name in stack.sites:
                    layers.setdefault(layer_of(name, lists), []).append(alone[name][number])
            shorter = [list(self._shorter(name, layers, measured)) for name in lists]
            best = _front([*best, *(together([*layers.get(None, []), *one]) for one in itertools.product(*shorter))])
        return best

    def _within_own(self, stack: Stack) -> list[int]:
        """Return the numbers of units that a budget for their kind allows."""
        site = self.sites[stack.sites[0]]
        limit = self._limit(site.kind)
        return [number for number in stack.numbers if number <= limit * site.num_units + 1e-9]

    def _limit(self, kind: str) -> float:
        return self.own[kind].limit if kind in self.own else 1.0

    def _shorter(
        self, name: str, layers: Mapping[tuple[str, int] | None, Sequence[Option]], measured: Measured
    ) -> Iterator[Option]:
        """Yield, for every number of layers that stay of a list, the choice of them that costs least."""
        budget = self.joint or self.cut.budgets[0]
        stay = [together(layers.get((name, number), ())) for number in range(len(measured[name]))]
        gone = [
            Option(
                self.share_of_layer(budget, f"{name}.{number}"), error, stay[number].kept if self.own else {},
                ((name, number),),
            )
            for number, (error, _) in enumerate(measured[name])
        ]  # fmt: skip
        order = sorted(range(len(stay)), key=lambda number: gone[number].error - stay[number].error)
        for count in range(len(order) - max(self.cut.floor, 1) + 1):
            option = together([*(gone[n] for n in order[:count]), *(stay[n] for n in order[count:])])
            if option.error < math.inf and len(order) - count <= self._limit("layers") * len(order) + 1e-9:
                yield option

    def _check_said(self, kinds: Collection[str]) -> None:
        """Raise `InvalidInputError` for a budget about units of which no config can say that some are gone."""
        for budget in self.cut.budgets:
            if not kinds or (budget.quantity in self.own and budget.quantity not in kinds):
                rule = f"be about units whose number the config of {self._name} can say, as that of its layers is"
                raise invalid("budget", rule, str(budget), "without `plain` a recipe says it")

    @property
    def _name(self) -> str:
        return type(base_of(self.model)).__name__

    def _too_much(self, parts: Sequence[Sequence[Option]]) -> InvalidInputError:
        asked = ",".join(map(str, self.cut.budgets))
        rule = f"leave as many units as the config of {self._name} can say"
        if self.joint is not None and all(parts):
            least = 1 - sum(max(option.saved for option in part) for part in parts)
            rule = (
                f"be at least {self.joint.quantity}={math.ceil(1000 * least) / 1000:g}, the least that the config of "
                f"{self._name} can say"
            )
        return invalid("budget", rule, asked, "without `plain` a recipe says it")


def _front(options: Sequence[Option]) -> list[Option]:
    """Leave out options that save less than another one that costs no more."""
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (-one.saved, one.error)):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found
