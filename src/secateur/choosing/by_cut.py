"""What finds the mask for a cut: which kinds of units may go from a model, and how many of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.choosing.allocation import SensitivitySelection
from secateur.choosing.budget import BudgetedSelection
from secateur.choosing.plain_selection import PlainSelection
from secateur.errors import UnsupportedModelError
from secateur.settings import Cut, Reading
from secateur.sites.layout import Site
from secateur.support.defaults import UNITS
from secateur.texts.calibration import PreparedModel
from secateur.texts.sources import reading_order

SENSITIVITY_TEXTS = 256
"""Texts that say where units go."""


def selection_of(
    prepared: PreparedModel, cut: Cut, texts: Any, reading: Reading, sites: Mapping[str, Site]
) -> BudgetedSelection | None:
    """Return what finds a mask within the budget of a cut, None where there is none."""
    if cut.allocation == "sensitivity" and isinstance(texts, Sequence):
        fitted = [texts[i] for i in reading_order(texts, reading)][:SENSITIVITY_TEXTS]
        kind = PlainSelection if cut.plain else SensitivitySelection
        return kind(prepared, cut, fitted, reading, sites)
    return BudgetedSelection(prepared.model, cut, reading.progress, sites) if cut.budgets else None


def kinds_there(prepared: PreparedModel, cut: Cut) -> tuple[str, ...]:
    """Return the kinds of units that may go. Neurons and layers that nobody named may be missing, as of experts.

    Raises `UnsupportedModelError` where others are.
    """
    named = {budget.quantity for budget in cut.budgets} | set(cut.units or ())
    found = list(cut.kinds)
    for kind in UNITS[1:]:
        if kind in found and kind not in named:
            try:
                prepared.sites_of([kind])
            except UnsupportedModelError:
                found.remove(kind)
    prepared.sites_of(found)
    return tuple(found)
