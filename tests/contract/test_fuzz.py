"""Damaged recipes, scores and masks: each is refused in the one form, or is whole. `make fuzz` tries far more of them.

The cases are the same in every run of the suite, and four times as many in `make robustness`; `make fuzz` draws others
each time.
"""

import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from secateur.errors import CheckpointError, InvalidInputError
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.sites.recipe import KEY, Recipe
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.damage import ODD, damaged
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask
from tests.support.units import ragged_mask

FULL = 2000
CASES = int(os.environ.get("FUZZ_CASES", FULL // 4))
SECTION = "Damaged recipes, scores and masks"
PLACES = ["encoder.layer.0.attention.self", "encoder.layer.0.attention.self.forward", "config", "layers.0", "10x4 1x4"]


def cases(number):
    """Try `number` cases where `CASES` is 2,000; fewer in the suite, and more where `make fuzz` asks for them."""
    return settings(
        max_examples=number * CASES // FULL,
        derandomize=CASES <= FULL,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Tally:
    """Counts what came of the cases, and says it."""

    def __init__(self):
        self.refused = self.whole = 0

    def __str__(self):
        total = self.refused + self.whole
        return f"{total:,} cases: {self.refused:,} refused in the one form, {self.whole:,} still whole and followed"


def check_message(error):
    text = str(error)
    assert text == text.strip() != ""
    assert "\n" not in text
    assert len(text) < 1000
    assert "`" in text or "is no " in text or ".json" in text  # a parameter or a file is named


@pytest.fixture(scope="module")
def recipes():
    """Recipes: a BERT with an emptied site, a T5, whose sites share a bias, a Llama with grouped queries, a ViT without
    some neurons.
    """
    found = {}
    for kind in ("bert", "t5", "llama"):
        model = tiny_model(kind)
        remove_(model, uneven_mask(find_sites(model), empty=kind == "bert"))
        found[kind] = json.loads(json.dumps(getattr(model.config, KEY)))
    model = tiny_model("vit")
    remove_(model, ragged_mask(find_units(model, ["heads", "neurons"])))
    return {**found, "vit": json.loads(json.dumps(getattr(model.config, KEY)))}


@pytest.fixture(scope="module")
def scores_data():
    """A scores file with all there can be in it."""
    scores = Scores(
        {"a.0": torch.tensor([0.5, -math.inf, 2.0, 1.0]), "a.1": torch.arange(6.0)},
        {"a.1": 3}, "random", {"a.0": torch.eye(4)}, num_texts=7, agreement=0.9,
    )  # fmt: skip
    return json.loads(json.dumps(scores.to_json()))


def test_a_damaged_recipe_is_refused_or_whole(recipes, outcome):
    tally = Tally()

    @cases(2000)
    @given(damaged(list(recipes.values()), PLACES))
    def try_one(data):
        try:
            recipe = Recipe.from_json(data)
        except CheckpointError as error:
            check_message(error)
            tally.refused += 1
            return
        again = Recipe.from_json(recipe.to_json())
        assert (again.kept, again.sites, again.bypassed) == (recipe.kept, recipe.sites, recipe.bypassed)
        assert all(max(kept, default=0) < again.sites[name].num_units for name, kept in again.kept.items())
        tally.whole += 1

    try_one()
    assert tally.refused > tally.whole > 0
    outcome(SECTION, "`head_pruning` in a config.json, one to three places changed", tally)


def test_a_model_is_rebuilt_from_a_damaged_recipe_or_not_at_all(recipes, outcome):
    tally = Tally()

    @cases(100)
    @given(st.sampled_from(sorted(recipes)), st.data())
    def try_one(kind, draw):
        config = CONFIGS[kind]()
        setattr(config, KEY, draw.draw(damaged([recipes[kind]], PLACES)))
        try:
            with torch.device("meta"):
                model = AutoModel.from_config(config)
        except CheckpointError as error:
            check_message(error)
            tally.refused += 1
            return
        assert find_class_attributes(model) == set()
        tally.whole += 1

    try_one()
    assert tally.refused > tally.whole > 0
    outcome(SECTION, "a model built from such a config", tally)


def find_class_attributes(model):
    """Return methods that a recipe has hidden behind values of its own."""
    return {
        (name, key) for name, module in model.named_modules() for key in vars(module)
        if callable(getattr(type(module), key, None)) and not callable(vars(module)[key])
    }  # fmt: skip


def test_any_json_is_no_recipe(outcome):
    values = st.recursive(st.sampled_from(ODD), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    tally = Tally()

    @cases(50)
    @given(values)
    def try_one(data):
        with pytest.raises(CheckpointError) as caught:
            Recipe.from_json(data)
        check_message(caught.value)
        tally.refused += 1

    try_one()
    outcome(SECTION, "`head_pruning` that is any other JSON", tally)


def test_damaged_scores_are_refused_or_selected_from(scores_data, outcome):
    tally = Tally()

    @cases(2000)
    @given(damaged([scores_data]), st.floats(0, 0.99), st.sampled_from(["uniform", "ranking"]), st.integers(0, 4))
    def try_one(data, ratio, allocation, least):
        try:
            scores = Scores.from_json(data)
        except InvalidInputError as error:
            check_message(error)
            tally.refused += 1
            return
        mask = select(scores, ratio, allocation, least)
        for site, vector in scores.items():
            present = vector > -math.inf
            assert not bool((mask[site] & ~present).any())
            assert int(mask[site].sum()) >= min(least, int(present.sum()))
        assert json.loads(json.dumps(Scores.from_json(scores.to_json()).to_json())) == scores.to_json()
        tally.whole += 1

    try_one()
    assert tally.refused > tally.whole > 0
    outcome(SECTION, "a scores file, one to three places changed, then a mask selected from it", tally)


def test_damaged_masks_are_refused_or_whole(outcome):
    data = Mask({"a": torch.tensor([True, False, True]), "b": torch.tensor([False, False])}).to_json()
    tally = Tally()

    @cases(1000)
    @given(damaged([data]))
    def try_one(data):
        try:
            mask = Mask.from_json(data)
        except InvalidInputError as error:
            check_message(error)
            tally.refused += 1
            return
        assert Mask.from_json(mask.to_json()) == mask
        assert 0 <= mask.pruning_ratio <= 1
        tally.whole += 1

    try_one()
    assert tally.refused > tally.whole > 0
    outcome(SECTION, "a mask file, one to three places changed", tally)


def test_damaged_bytes_of_a_scores_file(scores_data, tmp_path, outcome):
    whole, file = json.dumps(scores_data).encode(), tmp_path / "scores.json"
    tally = Tally()

    @cases(300)
    @given(st.integers(0, len(whole)), st.binary(max_size=6), st.integers(0, 6), st.booleans())
    def try_one(place, new, gone, cut):
        file.write_bytes(whole[:place] + new + (b"" if cut else whole[place + gone :]))
        try:
            Scores.load(file)
        except InvalidInputError as error:
            check_message(error)
            tally.refused += 1
        else:
            tally.whole += 1

    try_one()
    assert tally.refused > tally.whole > 0
    outcome(SECTION, "a scores file with bytes changed, or cut short", tally)
