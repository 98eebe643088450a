"""The criteria. To add one: write its file, and add its line here."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from secateur.errors import InvalidInputError, invalid

if TYPE_CHECKING:
    from secateur.scorers.base import Scorer

SCORERS = {
    "confidence": "secateur.scorers.confidence:ConfidenceScorer",
    "contribution": "secateur.scorers.contribution:ContributionScorer",
    "dsp": "secateur.scorers.dsp:DspScorer",
    "entropy": "secateur.scorers.entropy:EntropyScorer",
    "fisher": "secateur.scorers.fisher:FisherScorer",
    "l0": "secateur.scorers.l0:L0Scorer",
    "leave_one_out": "secateur.scorers.leave_one_out:LeaveOneOutScorer",
    "magnitude": "secateur.scorers.magnitude:MagnitudeScorer",
    "matching": "secateur.scorers.matching:MatchingScorer",
    "random": "secateur.scorers.random:RandomScorer",
    "relational_taylor": "secateur.scorers.relational_taylor:RelationalTaylorScorer",
    "smp": "secateur.scorers.smp:SmpScorer",
    "smp-plus": "secateur.scorers.smp_plus:SmpPlusScorer",
    "taylor": "secateur.scorers.taylor:TaylorScorer",
}
"""Criteria of heads, some of them of other units too: name → where the class is; named rather than imported, so that
the command line can list them at once."""

LAYER_SCORERS = {"block_influence": "secateur.scorers.block_influence:BlockInfluenceScorer"}
"""Criteria of layers alone."""

DEFAULT_SCORERS = {"heads": "matching", "neurons": "contribution", "layers": "block_influence"}
"""The criterion of each kind of unit where none is named."""

DEFAULT_SCORER = DEFAULT_SCORERS["heads"]


def scorer_class(name: str) -> type[Scorer]:
    """Return the class registered under `name`. Raises `InvalidInputError` naming the choices."""
    known = SCORERS | LAYER_SCORERS
    if name not in known:
        raise invalid("scorer", f"be one of {', '.join(sorted(known))}", name)
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def option_names(name: str) -> list[str]:
    """Return the options of the criterion registered under `name`. Raises what `scorer_class` raises."""
    chosen = scorer_class(name)
    return [] if chosen.__init__ is object.__init__ else list(inspect.signature(chosen).parameters)


def make_scorer(name: str, /, **options: Any) -> Scorer:
    """Build the criterion registered under `name`. Raises `InvalidInputError` for an option that it does not have."""
    chosen, known = scorer_class(name), option_names(name)
    for option in options:
        if option not in known:
            rule = f"be one of {', '.join(known)}" if known else "not be given, as there are none"
            raise InvalidInputError(f"scorer {name}: `option` must {rule}, got {option!r}")
    return chosen(**options)
