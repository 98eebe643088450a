"""What the rows of a comparison say: means and spreads, paired differences to dense, and which of those are noise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import ttest_1samp

from secateur.comparing.plan import DENSE
from secateur.errors import invalid

ALL_TASKS = "mean"
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Summary:
    """One scorer at one ratio on one task, over seeds; or on all tasks together (`task` is `ALL_TASKS`).

    `mean` and `std` are of the task's main metric. `difference` is the mean of pruned minus dense over pairs with the
    same task and seed, `p_value` that of a paired two-sided t-test on them; both are None for dense. `p_value` and
    `std` are None where there are fewer than two values, `p_value` also where all differences are the same but 0. Over
    all tasks, `mean` averages their means and `std` is over seeds. `retention` is the mean of pruned / dense: 1 =
    nothing lost.
    """

    task: str
    scorer: str
    ratio: float
    runs: int
    mean: float
    std: float | None
    difference: float | None
    p_value: float | None
    retention: float | None

    @property
    def is_noise(self) -> bool | None:
        """Whether the difference to dense may well be chance (p ≥ 0.05); None where that cannot be told."""
        return None if self.p_value is None else self.p_value >= SIGNIFICANCE


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Return a summary for each task, ratio and scorer in the order of `rows`, then one over all tasks.

    A cell without its dense partner has no difference. Over all tasks only seeds count that every task has.
    Raises `InvalidInputError` where there are no rows.
    """
    if not rows:
        raise invalid("rows", "hold at least one run", rows)
    values = {(r["task"], r["scorer"], r["ratio"], r["seed"]): float(r["value"]) for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys((r["scorer"], r["ratio"]) for r in rows))
    found = []
    for task in tasks:
        for scorer, ratio in methods:
            own = {key[3]: value for key, value in values.items() if key[:3] == (task, scorer, ratio)}
            if own:
                dense = {seed: values.get((task, DENSE, 0.0, seed)) for seed in own}
                pairs = [(own[seed], dense[seed]) for seed in own if dense[seed] is not None and scorer != DENSE]
                found.append(_summary(task, scorer, ratio, list(own.values()), pairs))
    if len(tasks) > 1:
        for scorer, ratio in methods:
            seeds = {seed for _, name, at, seed in values if (name, at) == (scorer, ratio)}
            whole = sorted(s for s in seeds if all((t, scorer, ratio, s) in values for t in tasks))
            means = [statistics.mean(values[t, scorer, ratio, s] for t in tasks) for s in whole]
            pairs = [
                (values[t, scorer, ratio, s], values[t, DENSE, 0.0, s])
                for s in whole
                for t in tasks
                if (t, DENSE, 0.0, s) in values and scorer != DENSE
            ]
            if means:
                found.append(_summary(ALL_TASKS, scorer, ratio, means, pairs))
    return found


def scorers_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the scorers in the order of the rows."""
    return [name for name in dict.fromkeys(row["scorer"] for row in rows) if name != DENSE]


def pruning_ratios(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the ratios at which models were pruned, from the lowest on."""
    return sorted({row["ratio"] for row in rows} - {0.0})


def _summary(task: str, scorer: str, ratio: float, values: list[float], pairs: list[Any]) -> Summary:
    differences = [pruned - dense for pruned, dense in pairs]
    return Summary(
        task=task,
        scorer=scorer,
        ratio=ratio,
        runs=len(values),
        mean=statistics.mean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        difference=statistics.mean(differences) if differences else None,
        p_value=_p_value(differences),
        retention=statistics.mean(p / d for p, d in pairs) if pairs and all(d for _, d in pairs) else None,
    )


_ROUNDING = 1e-9
"""Differences of equal metrics differ by less, and unequal metrics by more."""


def _p_value(differences: list[float]) -> float | None:
    if len(differences) < 2:
        return None
    if max(differences) - min(differences) <= _ROUNDING:
        # The test divides by the spread. Two equal differences are no proof, as metrics move in steps.
        return 1.0 if abs(differences[0]) <= _ROUNDING else None
    return float(ttest_1samp(differences, 0.0).pvalue)
