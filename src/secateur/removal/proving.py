"""The proof of a removal: what the gated model says, and what the cut one says, run until it does or cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import RemovalError, invalid
from secateur.models.failure import place_of, running_modules, site_of
from secateur.models.finite import check_finite
from secateur.removal.emptied import bypass_
from secateur.removal.left import Left
from secateur.removal.proof import cached_step, hidden_states, largest_difference
from secateur.removal.reshaped import reshape_
from secateur.sites.gating import probe
from secateur.sites.layout import AttentionSite, Site
from secateur.sites.narrowing import Undo
from secateur.sites.unit_gates import reached
from secateur.units.masks import Mask

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What code raises that counts on all units."""


@dataclass(frozen=True)
class Wanted:
    """What the cut model has to say: its `outputs`, and those of a `step` with a cache, or None where none runs."""

    outputs: list[Tensor]
    step: list[Tensor] | None


def gated_outputs(base: PreTrainedModel, mask: Mask, sites: Mapping[str, Site], inputs: Mapping[str, Any]) -> Wanted:
    """Return what the model says with its units gated. Raises `InvalidInputError` for a cut that `inputs` do not reach.

    Whatever were cut at a site that they do not reach, the outputs would be equal.
    """
    found: set[str] = set()
    others = [name for name, site in sites.items() if not isinstance(site, AttentionSite)]
    gates = {name: kept.to(torch.float32) for name, kept in mask.present(sites).items()}
    with probe(base, lambda reading: found.add(reading.site), gates=gates), reached(base, others, found):
        outputs = hidden_states(base, inputs)
        for tensor in outputs:
            check_finite(tensor, base, partial(hidden_states, base, inputs))
        try:
            step = cached_step(base, inputs)
        except FAILURES:  # with these inputs the whole model has no such step either
            step = None
    for name, vector in mask.present(sites).items():
        if name not in found and not vector.all():
            rule = f"reach the site {name!r}, which loses units"
            raise invalid("inputs", rule, list(inputs), "pass `inputs` that reach it")
    if step is not None and not all(bool(torch.isfinite(tensor).all()) for tensor in step):
        step = None  # as where the first token, all that the cache holds, is padding
    return Wanted(outputs, step)


@dataclass(frozen=True)
class Special:
    """Sites that do not run as they are once heads are gone, by what is done about it."""

    bypassed: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def difference_to(wanted: Wanted, base: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    """Return how far what the model says is from what is wanted, with a cache too where the whole model keeps one."""
    difference = largest_difference(wanted.outputs, hidden_states(base, inputs))
    if wanted.step is None:
        return difference
    return max(difference, largest_difference(wanted.step, cached_step(base, inputs) or []))


def prove(
    base: PreTrainedModel,
    inputs: Mapping[str, Any],
    wanted: Wanted,
    left: Left,
    undo: Undo,
) -> tuple[float, Special]:
    """Return the difference of the cut model to the gated one, and the sites that do not run as they are.

    A model that raises is run again: with the code of emptied sites left out, or with the widths corrected that the
    code of the site which was running asks for.
    """
    sites = {name: site for name, site in left.sites.items() if isinstance(site, AttentionSite)}
    kept = left.kept
    emptied = [site for name, site in sites.items() if not kept[name].any()]
    special = Special()
    while True:
        try:
            with running_modules(base) as running:
                return difference_to(wanted, base, inputs), special
        except FAILURES as error:
            site = sites.get(site_of(running, sites) or "")
            can_reshape = site is not None and 0 < int(kept[site.name].sum()) < site.original_num_units
            if site is not None and can_reshape and site.name not in special.reshaped:
                reshape_(base.get_submodule(site.name), site, int(kept[site.name].sum()), undo)
                special.reshaped.append(site.name)
            elif emptied and not special.bypassed:
                for bare in emptied:
                    bypass_(base, bare, undo)
                    special.bypassed.append(bare.name)
            else:
                where = f" at site {site.name}" if site is not None else ""
                place = place_of(error, base.get_submodule(running[-1] if running else ""))
                raise RemovalError(
                    f"{type(base).__name__} does not run with fewer units{where}: its code counts on all of them "
                    f"({place}: {' '.join(str(error).split())[:120]}); leave the site whole, or gate its units "
                    "with `secateur.gated`, which works, as scoring does; the model is unchanged"
                ) from error
