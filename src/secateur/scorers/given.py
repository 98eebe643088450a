"""Scores that were found before, in the place of scoring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.errors import InvalidInputError, invalid, shown
from secateur.settings import Reading
from secateur.sites.layout import Site
from secateur.units.masks import indices_of
from secateur.units.scores import Scores

_REMEDY = "score this model again"


def check_given(scorer: Any, options: Mapping[str, Any], reading: Reading) -> None:
    """Raise `InvalidInputError` for what says how to score, where the `scorer` is scores."""
    if not isinstance(scorer, Scores):
        return
    if options:
        raise InvalidInputError(f"`{next(iter(options))}` must belong to a scorer that is named, got scores")
    if reading.stop == "auto":
        raise invalid("stop", "be 'all' or a number where there are scores", reading.stop)


def fitting(scores: Scores, sites: Mapping[str, Site]) -> Scores:
    """Return the scores of these sites of a model, which may be fewer kinds than were scored.

    Raises `InvalidInputError` unless they are of the units that are there now.
    """
    kinds = {site.kind for site in sites.values()}
    ours = [name for name in scores if scores.kinds[name] in kinds]
    for name in ours:
        if name not in sites:
            raise invalid("scores", f"be of sites of the model, such as {next(iter(sites))!r}", name, _REMEDY)
    for name, site in sites.items():
        if name not in ours:
            raise invalid("scores", f"hold the {site.kind} at {name}", ours or list(scores), _REMEDY)
        count, groups = scores[name].numel(), scores.num_groups[name]
        if (count, groups) != (site.original_num_units, site.original_num_groups):
            rule = f"hold {site.original_num_units} {site.kind} in {site.original_num_groups} groups at {name}"
            raise invalid("scores", rule, [count, groups], _REMEDY)
        if (there := indices_of(scores[name] > -math.inf)) != list(site.units):
            rule = f"be of the {site.kind} that are there at {name}, {shown(list(site.units))}"
            raise invalid("scores", rule, there, _REMEDY)
    return scores.only(ours)
