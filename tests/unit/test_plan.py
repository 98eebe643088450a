"""What a pruning does where that was not asked for, and what does not go together."""

import pytest

from secateur.errors import InvalidInputError
from secateur.pruning_plan import check_steps, recommended, without_held_out
from secateur.settings import Cut, Reading

TEXTS = [str(number) for number in range(60)]


def plan(budget=None, units=None, allocation=None, restore=None, texts=TEXTS):
    cut = Cut(0.25, "uniform" if allocation is None else allocation, budget=budget, units=units)
    return recommended(cut, allocation, restore, texts)


@pytest.mark.parametrize(
    ("asked", "allocation", "restore"),
    [
        ({}, "uniform", "none"),
        ({"budget": "heads=0.5"}, "uniform", "none"),
        ({"budget": "neurons=0.5"}, "uniform", "none"),
        ({"budget": "macs=0.5", "units": ["heads"]}, "uniform", "none"),
        ({"budget": "macs=0.5"}, "sensitivity", "distill"),
        ({"budget": "params=0.5", "units": ["layers"]}, "sensitivity", "distill"),
        ({"budget": "heads=0.75,macs=0.5"}, "sensitivity", "distill"),
        ({"budget": "macs=0.5", "texts": TEXTS[:20]}, "uniform", "none"),
        ({"budget": "macs=0.5", "texts": iter(TEXTS)}, "uniform", "none"),
        ({"budget": "macs=0.5", "texts": None}, "uniform", "none"),
        ({"budget": "macs=0.5", "allocation": "uniform"}, "uniform", "none"),
        ({"budget": "macs=0.5", "allocation": "sensitivity"}, "sensitivity", "none"),
        ({"budget": "macs=0.5", "restore": "none"}, "sensitivity", "none"),
        ({"restore": "distill"}, "uniform", "distill"),
    ],
)
def test_what_is_not_asked_for_is_filled_in(asked, allocation, restore):
    cut, found = plan(**asked)
    assert (cut.allocation, found) == (allocation, restore)


def test_a_ratio_is_a_budget_for_each_kind_where_units_go_by_need():
    cut, _ = plan(units=["heads", "neurons"], allocation="sensitivity")
    assert [str(budget) for budget in cut.budgets] == ["heads=0.75", "neurons=0.75"]


@pytest.mark.parametrize(
    ("allocation", "restore", "refine", "needs"),
    [("uniform", "distill", 0, "restore"), ("sensitivity", "none", 0, "allocation"), ("uniform", "none", 1, "refine")],
)
def test_steps_that_read_texts_again_need_a_list(allocation, restore, refine, needs):
    cut = Cut(0.5, allocation, budget="heads=0.5")
    for texts in (None, iter(TEXTS)):
        with pytest.raises(InvalidInputError, match=f"^`{needs}`.* needs `texts` .*, in a list"):
            check_steps(texts, cut, refine, restore, Reading())
    check_steps(TEXTS, cut, refine, restore, Reading())


def test_one_text_of_ten_is_held_out_and_takes_its_label_along():
    labels = [2 * number for number in range(60)]
    texts, left, held_out = without_held_out(TEXTS, labels, 3)
    assert (len(texts), len(held_out)) == (54, 6)
    assert sorted([*texts, *held_out], key=int) == TEXTS
    assert left == [2 * int(text) for text in texts]
    assert without_held_out(TEXTS, None, 3)[1:] == (None, held_out)
    assert without_held_out(TEXTS, None, 4)[2] != held_out
    assert without_held_out(TEXTS[:29], labels, 3) == (TEXTS[:29], labels, [])
    assert len(without_held_out(TEXTS * 100, None, 3)[2]) == 256
    with pytest.raises(InvalidInputError, match="`labels` must have one entry for each text, 60, got 59"):
        without_held_out(TEXTS, labels[:59], 3)
