"""Units that stay, packed: what comes out is what went in, and nothing else is taken for it."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import CheckpointError
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Slice
from secateur.sites.packing import pack, unpack
from secateur.sites.recipe import Recipe

UNITS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))))


@given(UNITS)
def test_what_is_packed_comes_out_again_in_order(drawn):
    count, units = drawn
    assert unpack(pack(sorted(units)), count) == tuple(sorted(units))


@pytest.mark.parametrize(
    ("units", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 3], "0:4"), ([0, 1, 2, 7, 9, 10], "0:3 7 9:11")],
)
def test_few_runs_are_written_as_runs(units, text):
    assert pack(units) == text


def test_scattered_units_are_written_as_bits():
    units = list(range(0, 64, 2))
    assert pack(units) == "base64:qqqqqqqqqqo="  # 10101010 eight times
    assert unpack(pack(units), 64) == tuple(units)


@pytest.mark.parametrize(
    "text",
    [
        "0:9", "8", "3:3", "5:4", "2 1", "1 1", "-1", "-3:2", "x", "1:x", "0:999999999999999", "0.5", "1,2", "base64:!",
        "base64:////", "base64:" + "A" * 400, "base64:AAE=", 7, None, ["1"],
    ],
)  # fmt: skip
def test_anything_else_is_no_list_of_eight_units(text):
    with pytest.raises(ValueError, match=r"."):
        unpack(text, 8)


def feed_forward(name, count):
    every = tuple(range(count))
    slices = (Slice(f"{name}.in.weight", 0, "neuron", every), Slice(f"{name}.out.weight", 1, "output", every))
    return FeedForwardSite.unpruned(f"{name}.out", every, slices=slices, attributes={}, output=f"{name}.out")


def recipe_of(count, number, kept):
    sites = {site.name: site for site in (feed_forward(f"layer.{n}.mlp", count) for n in range(number))}
    return Recipe({name: tuple(kept(n)) for n, name in enumerate(sites)}, sites)


def test_half_of_the_neurons_of_a_large_model_take_few_bytes():
    """24 times 4,096 neurons, whichever half stays."""
    draw = random.Random(0)
    recipe = recipe_of(4096, 24, lambda n: sorted(draw.sample(range(4096), 2048)))
    data = json.dumps(recipe.to_json())
    assert len(data) <= 20_000
    assert Recipe.from_json(json.loads(data)) == recipe


def test_neurons_and_layers_are_beside_the_heads():
    sites = {"mlp.out": feed_forward("mlp", 8), "layers": LayerSite.unpruned("layers", 4)}
    recipe = Recipe({"mlp.out": (0, 1, 2, 5), "layers": (0, 3)}, sites, record={"scorer": "random"})
    data = recipe.to_json()
    assert data["format_version"] == 2
    assert (data["kept_heads"], data["kept_neurons"], data["kept_layers"]) == (
        {}, {"mlp.out": "0:3 5"}, {"layers": "0 3"},
    )  # fmt: skip
    assert Recipe.from_json(json.loads(json.dumps(data))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["kept_neurons"].update({"layer.0.mlp.out": "0:99999999999"}), "impossible run"),
        (lambda d: d["kept_neurons"].update({"layer.0.mlp.out": "base64:" + "/" * 4000}), "bits for more than 8"),
        (lambda d: d["kept_neurons"].update({"layer.0.mlp.out": [1]}), "must be a text, got list"),
        (lambda d: d["kept_neurons"].update({"elsewhere": "1"}), "KeyError"),
        (lambda d: d["kept_neurons"].pop("layer.0.mlp.out"), "for the same sites"),
        (lambda d: d["layouts"][0].update(num_neurons=10**9), "no whole number from 1"),
        (lambda d: d["layouts"][0].update(kind="words"), "KeyError"),
        (lambda d: d["layouts"][0].update(attributes={"in.size": "words"}), "unknown quantity among"),
        (lambda d: d["layouts"][0]["slices"][0].__setitem__(3, "0:99999999999"), "impossible run"),
    ],
)
def test_damage_is_told_before_memory_is_asked_for(change, message):
    data = json.loads(json.dumps(recipe_of(8, 2, lambda n: [0, 2, 3]).to_json()))
    change(data)
    with pytest.raises(CheckpointError, match=message):
        Recipe.from_json(data)


def test_the_first_format_is_still_read():
    """It knew heads alone, and layouts without a kind."""
    layout = {
        "sites": ["attention"], "num_heads": 2, "num_key_value_heads": 2, "head_dim": 1, "site": "", "output": "out",
        "slices": [["query.weight", 0, "query", "0x1 1x1"]], "attributes": {"num_heads": "heads"},
    }  # fmt: skip
    data = {"format_version": 1, "kept_heads": {"attention": [1]}, "layouts": [layout]}
    recipe = Recipe.from_json(data)
    assert recipe.kept == {"attention": (1,)}
    assert recipe.sites["attention"].slices[0].owners == (0, 1)
