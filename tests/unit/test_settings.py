"""Settings are checked where they are made, and one pruning looks at its model and its texts once."""

import pytest

import secateur
from secateur.errors import InvalidInputError
from secateur.models.inputs import example_inputs
from secateur.settings import Budget, Cut, Reading, Shape, settings_of
from secateur.sites import attention, finding
from secateur.texts import calibration
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


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
        "allocation": ("site", "", None, []),
        "floor": (-1, 1.5, True, None),
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
    steps = {} if streamed else {"refine": 2, "restore": "reconstruct"}
    reading = Reading(batch_size=8, maps=True)
    secateur.prune(
        tiny_model("bert"), iter(texts) if streamed else texts, budget="heads=0.5", tokenizer=tiny_tokenizer(),
        reading=reading, **steps,
    )  # fmt: skip
    assert len(found) == 1
    assert sorted(read) == sorted(texts)
