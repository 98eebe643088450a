"""What a summary makes of the rows of a comparison, by hand."""

import pytest

from secateur.cli.tables import comparison_table, markdown
from secateur.comparing.plan import DENSE
from secateur.comparing.summary import ALL_TASKS, summarise
from secateur.errors import InvalidInputError


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
