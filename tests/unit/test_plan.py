"""What a pruning does where that was not asked for, and what does not go together."""

import pytest

from secateur.errors import InvalidInputError
from secateur.pruning_plan import check_steps, recommended, without_held_out
from secateur.settings import Cut, Reading
from secateur.texts.examples import Row

TEXTS = [str(number) for number in range(60)]


def plan(budget=None, units=None, allocation=None, restore=None, texts=TEXTS):
    return recommended(Cut(0.25, allocation, budget=budget, units=units), restore, texts)


@pytest.mark.parametrize(
    ("asked", "allocation", "restore"),
    [
        ({}, "uniform", "reconstruct"),
        ({"texts": None}, "uniform", "none"),
        ({"texts": iter(TEXTS)}, "uniform", "none"),
        ({"units": ["layers"]}, "uniform", "none"),
        ({"restore": "none"}, "uniform", "none"),
        ({"budget": "heads=0.5"}, "uniform", "reconstruct"),
        ({"budget": "neurons=0.5"}, "uniform", "reconstruct"),
        ({"budget": "macs=0.5", "units": ["heads"]}, "uniform", "reconstruct"),
        ({"budget": "macs=0.5"}, "sensitivity", "distill"),
        ({"budget": "params=0.5", "units": ["layers"]}, "sensitivity", "distill"),
        ({"budget": "heads=0.75,macs=0.5"}, "sensitivity", "distill"),
        ({"budget": "macs=0.5", "texts": TEXTS[:20]}, "sensitivity", "reconstruct"),
        ({"budget": "macs=0.5", "texts": TEXTS[:7]}, "uniform", "reconstruct"),
        ({"budget": "macs=0.5", "texts": TEXTS[:5]}, "uniform", "none"),
        ({"budget": "macs=0.5", "texts": TEXTS[:20], "units": ["layers"]}, "sensitivity", "none"),
        ({"budget": "macs=0.5", "texts": iter(TEXTS)}, "uniform", "none"),
        ({"budget": "macs=0.5", "texts": None}, "uniform", "none"),
        ({"budget": "macs=0.5", "allocation": "uniform"}, "uniform", "reconstruct"),
        ({"budget": "macs=0.5", "allocation": "sensitivity"}, "sensitivity", "reconstruct"),
        ({"budget": "macs=0.5", "restore": "none"}, "sensitivity", "none"),
        ({"restore": "distill"}, "uniform", "distill"),
    ],
)
def test_what_is_not_asked_for_is_filled_in(asked, allocation, restore):
    cut, found, _ = plan(**asked)
    assert (cut.allocation, found) == (allocation, restore)


_NO_LIST = "texts in a list are needed, which can be read again"


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ({"budget": "macs=0.5"}, ()),
        ({"budget": "macs=0.5", "texts": None}, ()),
        ({"texts": TEXTS[:6]}, ()),
        ({"texts": TEXTS[:1]}, ("not reconstructed: 1 text, 6 are needed",)),
        ({"texts": iter(TEXTS)}, (f"not reconstructed: {_NO_LIST}",)),
        ({"texts": iter(TEXTS), "restore": "none"}, ()),
        ({"texts": iter(TEXTS), "restore": "distill"}, ()),  # refused as it was asked for
        ({"texts": TEXTS[:12], "restore": "distill"}, ("not distilled: 12 texts, 21 are needed",)),
        ({"texts": [Row()] * 12, "restore": "distill"}, ("not distilled: 12 inputs, 21 are needed",)),
        (
            {"budget": "macs=0.5", "texts": TEXTS[:5]},
            tuple(
                f"not {what}: 5 texts, {fewest} are needed"
                for what, fewest in (("allocated by sensitivity", 8), ("distilled", 21), ("reconstructed", 6))
            ),
        ),
    ],
)
def test_what_texts_do_not_suffice_for_is_said(asked, lines):
    assert plan(**asked)[2] == lines


def test_a_ratio_is_a_budget_for_each_kind_where_units_go_by_need():
    cut, _, _ = plan(units=["heads", "neurons"], allocation="sensitivity")
    assert [str(budget) for budget in cut.budgets] == ["heads=0.75", "neurons=0.75"]


@pytest.mark.parametrize(
    ("allocation", "restore", "refine", "needs"),
    [("uniform", "distill", 0, "restore"), ("sensitivity", "none", 0, "allocation"), ("uniform", "none", 1, "refine")],
)
def test_steps_that_read_texts_again_need_a_list(allocation, restore, refine, needs):
    cut = Cut(0.5, allocation, budget="heads=0.5", refine=refine)
    for texts in (None, iter(TEXTS)):
        with pytest.raises(InvalidInputError, match=f"^`{needs}`.* needs `texts` .*, in a list"):
            check_steps(texts, cut, restore, 1, Reading())
    check_steps(TEXTS, cut, restore, 1, Reading())


def held_out_of(texts, labels=None, seed=3, restore="distill", stop="all"):
    return without_held_out(texts, labels, restore, Reading(seed=seed, stop=stop))


def test_one_text_of_ten_is_held_out_and_takes_its_label_along():
    labels = [2 * number for number in range(60)]
    texts, left, held_out, _ = held_out_of(TEXTS, labels)
    assert (len(texts), len(held_out)) == (54, 6)
    assert sorted([*texts, *held_out], key=int) == TEXTS
    assert left == [2 * int(text) for text in texts]
    assert held_out_of(TEXTS)[1:3] == (None, held_out)
    assert held_out_of(TEXTS, seed=4)[2] != held_out
    assert held_out_of(TEXTS[:29], labels)[:3] == (TEXTS[:29], labels, [])
    assert held_out_of(TEXTS, labels, restore="reconstruct")[:3] == (TEXTS, labels, [])
    assert len(held_out_of(TEXTS * 100)[2]) == 256
    with pytest.raises(InvalidInputError, match="`labels` must have one entry for each text, 60, got 59"):
        held_out_of(TEXTS, labels[:59])


@pytest.mark.parametrize(
    ("restore", "stop", "count", "scored"),
    [("distill", "all", 60, 54), ("distill", "all", 6000, 1024), ("distill", 9, 60, 9), ("none", "all", 6000, "all")],
)
def test_of_all_texts_that_teach_some_are_scored(restore, stop, count, scored):
    assert held_out_of(TEXTS * (count // 60), restore=restore, stop=stop)[3].stop == scored
