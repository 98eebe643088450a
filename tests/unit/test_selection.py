import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.choosing.refinement import refine_mask
from secateur.errors import InvalidInputError
from secateur.removal.remove import gated, remove_
from secateur.settings import Cut
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask, PresentMask
from secateur.units.scores import PresentScores, Scores
from secateur.units.select import check_selection, select
from tests.support.tiny import tiny_model

UNEQUAL = {"a": torch.tensor([0.1, 0.9, 0.5, 0.4]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}


def test_site_scope_drops_the_lowest_of_every_site():
    mask = select(Scores(UNEQUAL), 0.5)
    assert mask.kept == {"a": [1, 2], "b": [2, 3]}


def test_global_scope_ranks_all_heads_and_leaves_one():
    mask = select(Scores(UNEQUAL), 0.5, "ranking")
    assert mask.kept == {"a": [1], "b": [1, 2, 3]}
    bare = select(Scores(UNEQUAL), 0.5, "ranking", floor=0)
    assert bare.kept == {"a": [], "b": [0, 1, 2, 3]}


def test_of_equal_heads_the_earlier_stays():
    scores = Scores({"a": torch.ones(5), "b": torch.ones(5)})
    assert select(scores, 0.4).kept == {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert select(scores, 0.4, "ranking").kept == {"a": [0, 1, 2, 3, 4], "b": [0]}
    many = Scores({"a": torch.ones(40)})  # more than a sort keeps in order by chance
    assert select(many, 0.5).kept == {"a": list(range(20))}
    assert select(many, 0.5, "ranking").kept == {"a": list(range(20))}


def test_the_budget_is_not_lost_to_rounding():
    assert select(Scores({"a": torch.arange(100.0)}), 0.29).num_kept == 71


def test_removed_heads_stay_removed_and_do_not_count():
    scores = Scores({"a": torch.tensor([3.0, -math.inf, 1.0, 2.0, -math.inf, 4.0])})
    assert select(scores, 0.5).kept == {"a": [0, 5]}
    assert select(scores, 0).kept == {"a": [0, 2, 3, 5]}
    assert select(scores, 0.5, "ranking").kept == {"a": [0, 5]}
    assert select(scores, 0, "ranking").kept == {"a": [0, 2, 3, 5]}


def test_a_site_that_lost_every_head_stays_empty():
    scores = Scores({"a": torch.full((4,), -math.inf), "b": UNEQUAL["b"]})
    assert select(scores, 0.5).kept == {"a": [], "b": [2, 3]}
    assert select(scores, 0.5, floor=0).kept == {"a": [], "b": [2, 3]}


@pytest.mark.parametrize("allocation", ["uniform", "ranking"])
def test_where_no_head_is_left_none_is_kept(allocation):
    scores = Scores({"a": torch.full((4,), -math.inf), "b": torch.full((2,), -math.inf)})
    mask = select(scores, 0.5, allocation)
    assert (mask.kept, mask.shape) == ({"a": [], "b": []}, {"a": 4, "b": 2})


def test_half_of_the_heads_go_unless_told_otherwise():
    assert select(Scores(UNEQUAL)) == select(Scores(UNEQUAL), 0.5)


def test_grouped_site_keeps_equal_groups():
    # Three groups of three. 9 heads at 0.5 leave 5 or more; the nearest equal shapes have 6: 2 groups whole, or 2 of
    # every group. The second keeps 9+8+7+6+5+4 = 39, the first 9+8+1+7+6+2 = 33.
    scores = Scores({"a": torch.tensor([9.0, 8, 1, 7, 6, 2, 5, 4, 3])}, {"a": 3})
    assert select(scores, 0.5).kept == {"a": [0, 1, 3, 4, 6, 7]}
    # With one group much the worst, whole groups win.
    scores = Scores({"a": torch.tensor([9.0, 8, 7, 9, 8, 7, 0, 0, 0])}, {"a": 3})
    assert select(scores, 0.5).kept == {"a": [0, 1, 2, 3, 4, 5]}


def test_negative_scores_do_not_make_a_grouped_site_smaller():
    # Two groups of four, of which 3 heads stay: three of one group, though fewer would add up to more.
    scores = Scores({"a": torch.tensor([-1.0, -2, -3, -4, -1.5, -6, -7, -8])}, {"a": 2})
    assert select(scores, 0.625).kept == {"a": [0, 1, 2]}


def test_one_head_of_every_group_is_a_shape():
    scores = Scores({"a": torch.tensor([1.0, 0, 1, 0])}, {"a": 2})
    assert select(scores, 0.5).kept == {"a": [0, 2]}


def test_a_shape_needs_as_many_heads_as_a_group_has():
    # Of four heads in two groups three would stay: no equal groups have three, so all four do.
    scores = Scores({"a": torch.tensor([9.0, 8, 7, 6])}, {"a": 2})
    assert select(scores, 0.25).kept == {"a": [0, 1, 2, 3]}


def test_grouped_heads_go_as_groups_globally():
    scores = Scores({"a": torch.tensor([9.0, 0, 4, 4]), "b": torch.tensor([1.0, 1, 8, 8])}, {"a": 2, "b": 2})
    assert select(scores, 0.5, "ranking").kept == {"a": [0, 1], "b": [2, 3]}


def pairwise(*gradients):
    """Scores of one site from every head's gradients over two texts."""
    g = torch.tensor(gradients, dtype=torch.float64)
    matrix = g @ g.T / g.shape[1]
    return Scores({"a": matrix.diagonal()}, interactions={"a": matrix})


def test_rearrangement_by_hand():
    """Heads 0 and 2 cancel: together they cost nothing, though 1 is the second cheapest alone."""
    scores = pairwise((1.0, 0.0), (1.0, 0.1), (-1.1, 0.0), (3.0, 3.0))
    alone = Scores(dict(scores))
    assert select(alone, 0.5).kept == {"a": [2, 3]}
    assert select(scores, 0.5).kept == {"a": [1, 3]}
    assert select(scores, 0.5, allocation="ranking").kept == {"a": [1, 3]}
    assert select(scores, 0.25).kept == {"a": [1, 2, 3]}
    assert select(scores, 0).kept == {"a": [0, 1, 2, 3]}
    assert select(Scores.from_json(scores.to_json()), 0.5).kept == {"a": [1, 3]}


@pytest.mark.parametrize("seed", range(5))
def test_rearrangement_is_the_papers_greedy_swap(seed):
    """Against the cost of whole sets of heads, written down from the gradients."""
    gradients = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def cost(heads):
        return float(gradients[sorted(heads)].sum(dim=0).square().mean())

    scores = pairwise(*gradients.tolist())
    order = sorted(range(9), key=lambda h: cost({h}))
    dropped = set(order[:4])
    for head in order[4:]:
        options = [(dropped - {d}) | {head} for d in dropped]
        dropped = min([dropped, *options], key=cost)
    mask = select(scores, 4 / 9)["a"]
    assert set((~mask).nonzero().flatten().tolist()) == dropped
    assert cost(dropped) < cost(order[:4])  # each of these seeds has something to gain


def test_heads_are_swapped_only_for_a_gain():
    even = Scores({"a": torch.ones(4)}, interactions={"a": torch.eye(4)})
    assert select(even, 0.5).kept == {"a": [0, 1]}


def test_a_removed_head_is_never_swapped_back():
    """Head 1 would cancel head 2, which goes; the place that it leaves is not taken by head 0, which is gone."""
    scores = pairwise((0.0, 0.0), (1.3, 0.0), (-1.1, 0.0), (3.0, 3.0))
    values = scores["a"].clone()
    values[0] = -math.inf
    gone = Scores({"a": values}, interactions=scores.interactions)
    assert not select(gone, 0.34)["a"][0]
    assert select(gone, 0.34).num_kept == 2


def test_grouped_heads_are_not_rearranged():
    scores = pairwise((1.0, 0.0), (1.0, 0.1), (-1.1, 0.0), (3.0, 3.0))
    grouped = Scores(dict(scores), {"a": 2}, interactions=scores.interactions)
    assert select(grouped, 0.5) == select(Scores(dict(scores), {"a": 2}), 0.5)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 0.99),
    st.sampled_from(["uniform", "ranking"]),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_masks_obey_their_rules(groups, size, ratio, allocation, floor, random):
    values = {s: torch.tensor([random.random() for _ in range(groups * size)]) for s in "ab"}
    mask = select(Scores(values, {"a": groups, "b": groups}), ratio, allocation, floor)
    assert mask.num_units - mask.num_kept <= math.floor(ratio * mask.num_units + 1e-9)
    for vector in mask.values():
        assert vector.sum() >= min(floor, groups * size)
        assert len(set(vector.view(groups, size).sum(dim=1).tolist()) - {0}) <= 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.floats(0, 0.99))
def test_kept_heads_score_at_least_as_much_as_dropped_ones(row, ratio):
    vector = torch.tensor(row, dtype=torch.float64)
    kept = select(Scores({"a": vector}), ratio)["a"]
    assert (~kept).sum() == math.floor(ratio * len(row) + 1e-9)
    assert kept.all() or vector[kept].min() >= vector[~kept].max()


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, math.nan, "half", None, True])
def test_ratio_out_of_range(ratio):
    with pytest.raises(InvalidInputError, match=r"`pruning_ratio` must be in \[0, 1\), got"):
        select(Scores(UNEQUAL), ratio)


def test_other_bad_arguments():
    with pytest.raises(InvalidInputError, match="`allocation` must be 'uniform' or 'ranking', got 'layer'"):
        select(Scores(UNEQUAL), 0.5, "layer")
    for wrong in (-1, True, 1.5, "1", None):
        with pytest.raises(InvalidInputError, match="`floor` must be a whole number from 0, got "):
            select(Scores(UNEQUAL), 0.5, floor=wrong)
    with pytest.raises(InvalidInputError, match="`scores` must be Scores"):
        select(UNEQUAL, 0.5)


def test_a_mask_is_in_the_numbering_of_its_scores():
    rows = {"a": [1.0, 2.0, 3.0, 4.0]}
    original, present = select(Scores(rows)), select(PresentScores(rows))
    assert (type(original), type(present)) == (Mask, PresentMask)
    assert original.kept == present.kept == {"a": [2, 3]}
    assert original != present


def test_what_counts_otherwise_is_no_mask_for_a_model():
    model = tiny_model("bert")
    present = PresentMask({name: torch.ones(4, dtype=torch.bool) for name in find_sites(model)})
    with pytest.raises(InvalidInputError, match="`mask` must be a Mask"):
        remove_(model, present)
    with pytest.raises(InvalidInputError, match="`mask` must be a Mask"), gated(model, present):
        pass
    with pytest.raises(InvalidInputError, match="`mask` must be a Mask"):
        refine_mask(model, present, ["a", "b", "c"])


def test_what_is_selected_with_is_checked_without_scores():
    right = {"pruning_ratio": 0, "allocation": "ranking", "floor": 0}
    check_selection(**right)
    for wrong in ({"pruning_ratio": 1}, {"allocation": "layer"}, {"floor": -1}):
        with pytest.raises(InvalidInputError, match=f"`{next(iter(wrong))}` must"):
            check_selection(**right | wrong)


def test_neurons_stay_in_multiples():
    draw = torch.Generator().manual_seed(0)
    scores = Scores(
        {"a": torch.rand(100, generator=draw), "b": torch.rand(20, generator=draw), "c": torch.rand(8, generator=draw)},
        kinds={"a": "neurons", "b": "neurons"},
    )
    mask = select(scores, 0.5)
    assert {name: int(row.sum()) for name, row in mask.items()} == {"a": 64, "b": 20, "c": 4}
    assert mask.kept["a"] == sorted(scores["a"].topk(64).indices.tolist())
    assert {name: int(row.sum()) for name, row in select(scores, 0.5, multiple=1).items()} == {"a": 50, "b": 10, "c": 4}
    assert int(select(scores, 0.5, multiple=8)["a"].sum()) == 56


def test_of_equal_neurons_the_earlier_fill_a_multiple():
    scores = Scores({"a": torch.zeros(1000)}, kinds={"a": "neurons"})
    assert select(scores, 0.75, multiple=300).kept == {"a": [*range(300)]}


def test_neurons_that_went_before_fill_no_multiple():
    gone = -math.inf
    scores = Scores({"a": torch.tensor([gone, 3, gone, 1, gone, 2, gone, gone])}, kinds={"a": "neurons"})
    assert select(scores, 0.4, multiple=8).kept == {"a": [1, 3, 5]}


def test_a_multiple_that_is_none_is_refused_and_heads_have_none():
    rows = {"a": torch.arange(100.0), "b": torch.arange(12.0)}
    scores = Scores(rows, kinds={"a": "neurons"})
    kept = select(scores, 0.75, multiple=30)
    assert (int(kept["a"].sum()), int(kept["b"].sum())) == (30, 3)
    assert kept.kept["a"] == list(range(70, 100))
    with pytest.raises(InvalidInputError, match="`multiple` must"):
        select(scores, multiple=0)


@pytest.mark.parametrize("allocation", ["uniform", "ranking"])
def test_layers_that_hold_excluded_sites_are_ranked_last(allocation):
    """Of a list that has lost its first layer, the layer now called 0 is number 1."""
    rows = {"layers.0.attn": [1.0, 2.0], "layers.1.attn": [3.0, 4.0], "layers": [-math.inf, 0.1, 0.2, 0.3]}
    scores = Scores(rows, kinds={"layers": "layers"})
    may_go = Cut(exclude=["layers.0.*"]).may_go(scores)
    assert set(may_go) == {"layers.1.attn", "layers"}
    only = may_go.only(["layers"])
    assert [select(only, ratio, allocation, 0).kept["layers"] for ratio in (0, 0.34, 0.67, 0.99)] == [
        [1, 2, 3], [1, 3], [1], [1],
    ]  # fmt: skip
    every = Cut(exclude=["layers.*"]).may_go(scores)
    assert select(every, 0.99, allocation, 0).kept == {"layers": [1, 2]}
