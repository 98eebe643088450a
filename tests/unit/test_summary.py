"""What a summary makes of the rows of a comparison, by hand."""

import pytest

from secateur.cli.tables import comparison_table, markdown
from secateur.comparing.plan import DENSE
from secateur.comparing.summary import ALL_TASKS, not_learned, summarise
from secateur.errors import InvalidInputError
from secateur.report.numbers import DASH


def row(task, scorer, seed, value, ratio=0.5):
    return {"task": task, "scorer": scorer, "ratio": 0.0 if scorer == DENSE else ratio, "seed": seed, "value": value}


ROWS = [
    *(row("a", DENSE, s, v) for s, v in enumerate([0.80, 0.90, 0.85])),
    *(row("a", "x", s, v) for s, v in enumerate([0.70, 0.78, 0.76])),
    *(row("b", DENSE, s, v) for s, v in enumerate([0.50, 0.50, 0.50])),
    *(row("b", "x", s, v) for s, v in enumerate([0.40, 0.60, 0.50])),
]


def test_summary_by_hand():
    found = {(s.task, s.scorer): s for s in summarise(ROWS)}
    a = found["a", "x"]
    assert a.mean == pytest.approx(2.24 / 3)
    assert a.difference == pytest.approx(-0.31 / 3)  # -.10, -.12, -.09
    # t = mean / (std / sqrt n) = -.10333 / (.015275 / 1.73205) = -11.717; two-sided, 2 degrees of freedom.
    assert a.p_value == pytest.approx(0.00720, abs=1e-4)
    assert a.is_noise is False
    b = found["b", "x"]
    assert b.difference == pytest.approx(0, abs=1e-12)
    assert b.is_noise is True
    mean = found[ALL_TASKS, "x"]
    assert mean.mean == pytest.approx((a.mean + b.mean) / 2)
    ratios = [0.70 / 0.80, 0.78 / 0.90, 0.76 / 0.85, 0.8, 1.2, 1.0]
    assert mean.retention == pytest.approx(sum(ratios) / 6)
    assert found["a", DENSE].difference is None
    assert "-0.103*" in markdown(comparison_table(summarise(ROWS)))


def test_summary_of_little():
    only = summarise(ROWS[3:4])[0]
    assert (only.runs, only.std, only.difference, only.is_noise) == (1, None, None, None)
    for lost in (0.1, 0.05):  # in floats the differences of the second are equal but for rounding
        rows = [row("a", DENSE, 0, 0.8), row("a", DENSE, 1, 0.85)]
        same = summarise([*rows, row("a", "x", 0, 0.8 - lost), row("a", "x", 1, 0.85 - lost)])
        assert (same[1].p_value, same[1].is_noise) == (None, None)  # two equal steps prove nothing
    level = summarise([*rows, row("a", "x", 0, 0.1 + 0.7), row("a", "x", 1, 0.15 + 0.7)])
    assert level[1].p_value == 1
    with pytest.raises(InvalidInputError, match="rows"):
        summarise([])


def test_runs_whose_dense_model_learned_nothing_count_for_nothing():
    """Seed 0 of `a` and all of `b` predict one class, as the best constant answer does."""
    constant = {"a": 0.80, "b": 0.50}
    rows = [{**each, "metric": "accuracy", "constant": constant[each["task"]]} for each in ROWS]
    found = {(s.task, s.scorer): s for s in summarise(rows)}
    a, b, mean = found["a", "x"], found["b", "x"], found[ALL_TASKS, "x"]
    kept = [0.78 / 0.90, 0.76 / 0.85]
    assert a.retention == mean.retention == pytest.approx(sum(kept) / 2)
    assert a.difference == mean.difference == pytest.approx((-0.12 - 0.09) / 2)
    assert a.mean == pytest.approx(2.24 / 3)  # what was measured is shown
    assert (b.retention, b.difference, b.p_value, b.left_out) == (None, None, None, 3)
    assert (a.left_out, mean.left_out, found["b", DENSE].left_out) == (1, 4, 0)

    first, second = not_learned(rows)
    assert first.startswith("a: in 1 of 3 runs the dense model is no better than a constant answer (accuracy 0.800")
    assert "b: in 3 of 3 runs" in second
    for words in ("more training texts", "more epochs", "another learning rate"):
        assert words in second
    assert not_learned(ROWS) == []  # rows that do not say what a constant answer reaches

    only = markdown(comparison_table(summarise([each for each in rows if each["task"] == "b"])))
    assert only.splitlines()[-1].endswith(f"| 0.500 ± 0.100 | {DASH} |")
