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
    nothing lost. `left_out` counts the pairs that neither has, as their dense model learned nothing (`dense_values`).
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
    left_out: int = 0

    @property
    def is_noise(self) -> bool | None:
        """Whether the difference to dense may well be chance (p ≥ 0.05); None where that cannot be told."""
        return None if self.p_value is None else self.p_value >= SIGNIFICANCE


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Return a summary for each task, ratio and scorer in the order of `rows`, then one over all tasks.

    A cell without its dense partner, or with one that learned nothing, has no difference. Over all tasks only seeds
    count that every task has. Raises `InvalidInputError` where there are no rows.
    """
    if not rows:
        raise invalid("rows", "hold at least one run", rows)
    values = {(r["task"], r["scorer"], r["ratio"], r["seed"]): float(r["value"]) for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys((r["scorer"], r["ratio"]) for r in rows))
    dense = {(r["task"], r["seed"]): None for r in rows if r["scorer"] == DENSE} | dense_values(rows)
    found = []
    for task in tasks:
        for method in methods:
            own = {key[3]: value for key, value in values.items() if key[:3] == (task, *method)}
            if own:
                pairs = [(value, dense[task, seed]) for seed, value in own.items() if (task, seed) in dense]
                found.append(_summary(task, method, list(own.values()), pairs))
    if len(tasks) > 1:
        for method in methods:
            seeds = {key[3] for key in values if key[1:3] == method}
            whole = sorted(s for s in seeds if all((t, *method, s) in values for t in tasks))
            means = [statistics.mean(values[(t, *method, s)] for t in tasks) for s in whole]
            pairs = [(values[(t, *method, s)], dense[t, s]) for s in whole for t in tasks if (t, s) in dense]
            if means:
                found.append(_summary(ALL_TASKS, method, means, pairs))
    return found


def dense_values(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """Return what the dense model reached, by task and seed, in the runs that count.

    A run counts where the dense model is better than the best constant answer (the row's `constant`, of
    `constant_metric`): to keep all of nothing is no feat. A row that does not say what that reaches counts.
    """
    return {(r["task"], r["seed"]): float(r["value"]) for r in rows if r["scorer"] == DENSE and not _learned_nothing(r)}


def not_learned(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each task with runs whose dense model learned nothing: which, and what to do about it."""
    found = []
    dense = [row for row in rows if row["scorer"] == DENSE]
    for task in dict.fromkeys(row["task"] for row in dense):
        own = [row for row in dense if row["task"] == task]
        lost = [row for row in own if _learned_nothing(row)]
        if lost:
            best = max(lost, key=lambda row: row["value"])
            found.append(
                f"{task}: in {len(lost)} of {len(own)} runs the dense model is no better than a constant "
                f"answer ({best['metric']} {best['value']:.3f}, a constant answer {best['constant']:.3f}). "
                "They are left out of differences and retention; compare anew with more training texts, more epochs or "
                "another learning rate"
            )
    return found


def scorers_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the scorers in the order of the rows."""
    return [name for name in dict.fromkeys(row["scorer"] for row in rows) if name != DENSE]


def pruning_ratios(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the ratios at which models were pruned, from the lowest on."""
    return sorted({row["ratio"] for row in rows} - {0.0})


def _learned_nothing(row: Mapping[str, Any]) -> bool:
    constant = row.get("constant")
    return constant is not None and row["value"] <= constant + _ROUNDING


def _summary(
    task: str, method: tuple[str, float], values: list[float], pairs: Sequence[tuple[float, float | None]]
) -> Summary:
    """Summarise `values`, and `pairs` of a run and its dense partner, None where that does not count."""
    scorer, ratio = method
    counting = [(value, dense) for value, dense in pairs if dense is not None and scorer != DENSE]
    differences = [pruned - dense for pruned, dense in counting]
    return Summary(
        task=task,
        scorer=scorer,
        ratio=ratio,
        runs=len(values),
        mean=statistics.mean(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        difference=statistics.mean(differences) if differences else None,
        p_value=_p_value(differences),
        retention=statistics.mean(p / d for p, d in counting) if counting and all(d for _, d in counting) else None,
        left_out=0 if scorer == DENSE else len(pairs) - len(counting),
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
