import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import InvalidInputError
from secateur.heads import HeadScores
from secateur.selection import select_heads

UNEQUAL = {"a": torch.tensor([0.1, 0.9, 0.5, 0.4]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}


def test_site_scope_drops_the_lowest_of_every_site():
    mask = select_heads(HeadScores(UNEQUAL), 0.5)
    assert mask.kept_heads == {"a": [1, 2], "b": [2, 3]}


def test_global_scope_ranks_all_heads_and_leaves_one():
    mask = select_heads(HeadScores(UNEQUAL), 0.5, "global")
    assert mask.kept_heads == {"a": [1], "b": [1, 2, 3]}
    bare = select_heads(HeadScores(UNEQUAL), 0.5, "global", min_heads=0)
    assert bare.kept_heads == {"a": [], "b": [0, 1, 2, 3]}


def test_of_equal_heads_the_earlier_stays():
    scores = HeadScores({"a": torch.ones(5), "b": torch.ones(5)})
    assert select_heads(scores, 0.4).kept_heads == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert select_heads(scores, 0.4, "global").kept_heads == {"a": [0, 1, 2, 3, 4], "b": [0]}


def test_the_budget_is_not_lost_to_rounding():
    assert select_heads(HeadScores({"a": torch.arange(100.0)}), 0.29).num_kept == 71


def test_removed_heads_stay_removed_and_do_not_count():
    scores = HeadScores({"a": torch.tensor([3.0, -math.inf, 1.0, 2.0, -math.inf, 4.0])})
    assert select_heads(scores, 0.5).kept_heads == {"a": [0, 5]}
    assert select_heads(scores, 0).kept_heads == {"a": [0, 2, 3, 5]}


def test_grouped_site_keeps_equal_groups():
    # Three groups of three. 9 heads at 0.5 leave 5 or more; the nearest equal shapes have 6: 2 groups whole, or 2 of
    # every group. The second keeps 9+8+7+6+5+4 = 39, the first 9+8+1+7+6+2 = 33.
    scores = HeadScores({"a": torch.tensor([9.0, 8, 1, 7, 6, 2, 5, 4, 3])}, {"a": 3})
    assert select_heads(scores, 0.5).kept_heads == {"a": [0, 1, 3, 4, 6, 7]}
    # With one group much the worst, whole groups win.
    scores = HeadScores({"a": torch.tensor([9.0, 8, 7, 9, 8, 7, 0, 0, 0])}, {"a": 3})
    assert select_heads(scores, 0.5).kept_heads == {"a": [0, 1, 2, 3, 4, 5]}


def test_grouped_heads_go_as_groups_globally():
    scores = HeadScores({"a": torch.tensor([9.0, 0, 4, 4]), "b": torch.tensor([1.0, 1, 8, 8])}, {"a": 2, "b": 2})
    assert select_heads(scores, 0.5, "global").kept_heads == {"a": [0, 1], "b": [2, 3]}


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 0.99),
    st.sampled_from(["site", "global"]),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_masks_obey_their_rules(groups, size, ratio, scope, floor, random):
    values = {s: torch.tensor([random.random() for _ in range(groups * size)]) for s in "ab"}
    mask = select_heads(HeadScores(values, {"a": groups, "b": groups}), ratio, scope, floor)
    assert mask.num_heads - mask.num_kept <= math.floor(ratio * mask.num_heads + 1e-9)
    for vector in mask.values():
        assert vector.sum() >= min(floor, groups * size)
        assert len(set(vector.view(groups, size).sum(dim=1).tolist()) - {0}) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0, 0.99))
def test_kept_heads_score_at_least_as_much_as_dropped_ones(row, ratio):
    vector = torch.tensor(row, dtype=torch.float64)
    kept = select_heads(HeadScores({"a": vector}), ratio)["a"]
    assert (~kept).sum() == math.floor(ratio * len(row) + 1e-9)
    assert kept.all() or vector[kept].min() >= vector[~kept].max()


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, math.nan, "half", None, True])
def test_ratio_out_of_range(ratio):
    with pytest.raises(InvalidInputError, match=r"`pruning_ratio` must be in \[0, 1\), got"):
        select_heads(HeadScores(UNEQUAL), ratio)


def test_other_bad_arguments():
    with pytest.raises(InvalidInputError, match="`scope` must be 'site' or 'global', got 'layer'"):
        select_heads(HeadScores(UNEQUAL), 0.5, "layer")
    with pytest.raises(InvalidInputError, match="`min_heads` must be a whole number from 0, got -1"):
        select_heads(HeadScores(UNEQUAL), 0.5, min_heads=-1)
    with pytest.raises(InvalidInputError, match="`scores` must be HeadScores"):
        select_heads(UNEQUAL, 0.5)
