"""Settings are checked where they are made, and one pruning looks at its model and its texts once."""

import inspect
import re

import pytest

import secateur
from secateur.errors import InvalidInputError
from secateur.models.inputs import example_inputs
from secateur.scorers import make_scorer
from secateur.settings import Budget, Cut, Reading, Shape, settings_of
from secateur.sites import attention, finding
from secateur.texts import calibration
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import small_model


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "batch_size": (0, -1, 2.5, True, "8", None),
        "max_length": (3, 0, 64.0, None),
        "seed": (-1, 2**32, 1.0, "0"),
        "stop": (0, 1.5, "some", True, None),
        "bf16": (0, "yes", None),
        "maps": (1, None),
        "progress": (1, None),
        "accelerator": ({}, 2),
    }.items(),
)
def test_a_reading_names_what_it_refuses(field, values):
    for value in values:
        with pytest.raises(InvalidInputError, match=f"`{field}` must"):
            Reading(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "pruning_ratio": (1, -0.1, True, "half", None),
        "allocation": ("site", "", 3, []),
        "floor": (-1, 1.5, True, None),
        "refine": (-1, 1.5, True, None),
    }.items(),
)
def test_a_cut_names_what_it_refuses(field, values):
    for value in values:
        with pytest.raises(InvalidInputError, match=f"`{field}` must"):
            Cut(**{field: value})


def test_defaults_stand_for_none_and_other_kinds_are_refused():
    assert settings_of(None, Reading) == Reading()
    given = Reading(batch_size=4)
    assert settings_of(given, Reading) is given
    with pytest.raises(InvalidInputError, match=r"`reading` must be a Reading, such as secateur.Reading\(\), got 32"):
        settings_of(32, Reading)


def test_ready_inputs_need_no_texts_beside_them():
    model = tiny_model("bert")
    inputs = [example_inputs(model)]
    alone, beside = (secateur.score(model, texts, "contribution", inputs=inputs) for texts in (None, []))
    assert alone == beside
    assert alone.num_texts is None


def test_a_budget_reads_what_it_writes():
    for text in ("heads=0.5", "params=0.9", "macs=0.85@1x512", "latency=0.8@8x128"):
        assert str(Budget.parse(text)) == text
    assert Budget.parse("macs=0.85").shape == Shape(1, 128)


@pytest.mark.parametrize(
    ("option", "where"), [("max_length", "reading=secateur.Reading"), ("floor", "cut=secateur.Cut")]
)
def test_a_setting_among_the_scorers_options_is_told_where_it_belongs(option, where):
    with pytest.raises(InvalidInputError, match=f"`{option}` belongs into .*{where}"):
        secateur.score(tiny_model("bert"), tiny_texts(4), "contribution", tiny_tokenizer(), **{option: 8})


@pytest.mark.parametrize("call", [secateur.prune, secateur.preview])
@pytest.mark.parametrize("scorer", ["random", make_scorer("random"), {"heads": "random"}])
@pytest.mark.parametrize("field", ["allocation", "floor", "exclude", "plain", "refine"])
def test_a_field_of_a_cut_is_not_taken_for_a_scorers_option(call, scorer, field):
    remedy = re.escape(f"`{field}` belongs into `cut`: cut=secateur.Cut({field}=…)")
    with pytest.raises(InvalidInputError, match=remedy):
        call("no such folder", tiny_texts(8), scorer=scorer, **{field: 1})


def test_a_call_can_be_read():
    for call in (secateur.prune, secateur.preview):
        model, *keywords, options = inspect.signature(call).parameters.values()
        assert (model.name, options.kind) == ("model", inspect.Parameter.VAR_KEYWORD)
        assert len(keywords) <= 12, call


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"heads": (12, 9)}),
        ({"pruning_ratio": 0.5}, {"heads": (12, 6)}),
        ({"pruning_ratio": 0}, {"heads": (12, 12)}),
        ({"budget": "layers=0.7"}, {"layers": (3, 2)}),
    ],
)
def test_keywords_take_the_place_of_fields_of_the_cut(given, left):
    _, report = secateur.prune(small_model("wide bert"), scorer="random", cut=Cut(0.25), **given)
    assert report.units == left
    assert report.allocation == "uniform"


def test_units_of_the_cut_are_those_that_go():
    _, report = secateur.prune(small_model("wide bert"), scorer="random", cut=Cut(0.4, units=["layers"]))
    assert report.units == {"layers": (3, 2)}


def test_a_cut_alone_says_what_goes():
    cut = Cut(budget="heads=0.5", allocation="ranking", floor=0)
    _, report = secateur.prune(small_model("wide bert"), scorer="magnitude", cut=cut)
    _, asked = secateur.prune(
        small_model("wide bert"), scorer="magnitude", budget="heads=0.5", cut=Cut(0.9, "ranking", 0)
    )
    assert report.mask == asked.mask
    assert (report.allocation, str(report.budget[0].budget)) == ("ranking", "heads=0.5")


def test_an_allocation_that_nobody_asked_for_is_the_same_share_everywhere():
    assert (Cut().allocation, Cut().ranked) == (None, "uniform")


@pytest.mark.parametrize("streamed", [False, True])
def test_one_pruning_finds_sites_once_and_tokenises_each_text_once(monkeypatch, streamed):
    texts = list(dict.fromkeys(tiny_texts(48)))[:40]
    found, read = [], []

    def find_sites(*arguments, **options):
        found.append(1)
        return attention.find_sites(*arguments, **options)

    def tokenize(tokenizer, some, *rest):
        read.extend(some)
        return original(tokenizer, some, *rest)

    original = calibration.tokenize
    for module in (calibration, finding):
        monkeypatch.setattr(module, "find_sites", find_sites)
    monkeypatch.setattr(calibration, "tokenize", tokenize)
    steps = {} if streamed else {"cut": Cut(refine=2), "restore": "reconstruct"}
    reading = Reading(batch_size=8, maps=True)
    secateur.prune(
        tiny_model("bert"), iter(texts) if streamed else texts, budget="heads=0.5", tokenizer=tiny_tokenizer(),
        reading=reading, **steps,
    )  # fmt: skip
    assert len(found) == 1
    assert sorted(read) == sorted(texts)
