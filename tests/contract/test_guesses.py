"""Refusals that guess what was meant: names, percentages, tables, folders and names of models."""

import re
import time

import datasets
import huggingface_hub
import pytest

import secateur
from secateur import cli
from secateur.errors import CheckpointError, InvalidInputError
from secateur.models import hub_access
from secateur.models.loading import load_model, load_tokenizer
from secateur.scorers import make_scorer
from secateur.scorers.smp import load_pruner
from secateur.texts.data import load_task
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

ROWS = [{"label": 1, "sentence": "good film"}, {"label": 0, "sentence": "bad film"}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.5}, "`prune` has no `ratio`; did you mean `pruning_ratio`?"),
        ({"label": [1]}, "`prune` has no `label`; did you mean `labels`?"),
        ({"exlude": ["a"]}, "`prune` has no `exlude`; did you mean cut=secateur.Cut(exclude=…)?"),
        ({"batchsize": 4}, "`prune` has no `batchsize`; did you mean reading=secateur.Reading(batch_size=…)?"),
        ({"units": ["heads"]}, "`units` belongs into `cut`: cut=secateur.Cut(units=…)"),
        ({"scorer": "l0", "epochs": 1, "step": 3}, "`prune` has no `step`; did you mean `steps`?"),
        ({"scorer": make_scorer("random"), "ratio": 0.5}, "`prune` has no `ratio`; did you mean `pruning_ratio`?"),
    ],
)
def test_a_keyword_near_a_known_one(given, message):
    with pytest.raises(InvalidInputError) as caught:
        secateur.prune("no such folder", tiny_texts(8), **given)
    assert str(caught.value) == message


def test_other_calls_name_their_own_keywords():
    with pytest.raises(InvalidInputError, match=r"`preview` has no `label`; did you mean `labels`\?"):
        secateur.preview("no such folder", tiny_texts(8), label=[1])
    with pytest.raises(InvalidInputError, match=r"`units` belongs into `cut`: cut=secateur.Cut\(units=…\)"):
        secateur.preview("no such folder", tiny_texts(8), units=["heads"])
    with pytest.raises(InvalidInputError, match=r"`score` has no `unit`; did you mean `units`\?"):
        secateur.score(tiny_model("bert"), unit=["heads"], scorer="random")


def test_a_keyword_of_the_scorer_is_its_own():
    with pytest.raises(InvalidInputError, match="`option` must not be given, as there are none, got 'zzz'"):
        secateur.score(tiny_model("bert"), scorer="random", zzz=3)
    with pytest.raises(InvalidInputError, match="`zzz` must belong to a scorer that is named"):
        secateur.score(tiny_model("bert"), scorer=make_scorer("random"), zzz=3)


@pytest.mark.parametrize(
    ("given", "guess"),
    [
        ({"pruning_ratio": 50}, "got 50; did you mean 0.5?"),
        ({"pruning_ratio": 100}, "got 100"),
        ({"pruning_ratio": 1}, "got 1"),
        ({"budget": "latency=2x@8x128"}, "got 'latency=2x@8x128'; did you mean 0.5x?"),
        ({"budget": "latency=2@8x128"}, "got 'latency=2@8x128'; did you mean 0.5?"),
        ({"budget": "latency=3x@8x128"}, "did you mean 0.333x?"),
        ({"budget": "macs=50"}, "got 'macs=50'; did you mean 0.5?"),
        ({"budget": "macs=50%"}, "got 'macs=50%'; did you mean 0.5?"),
        ({"budget": "heads=0.5,neurons=75"}, "got 'neurons=75'; did you mean 0.75?"),
        ({"budget": "mac=0.5"}, "got 'mac=0.5'; did you mean macs?"),
        ({"budget": "macs=500"}, "got 'macs=500'"),
        ({"budget": "macs=0"}, "got 'macs=0'"),
    ],
)
def test_a_number_that_is_too_large_may_be_a_percentage_or_a_factor(given, guess, tmp_path, capsys):
    with pytest.raises(InvalidInputError) as caught:
        secateur.prune("no such folder", tiny_texts(8), **given)
    assert str(caught.value).endswith(guess)
    name, value = next(iter(given.items()))
    option = {"pruning_ratio": "--ratio"}.get(name, f"--{name}")
    assert cli.main(["prune", "nowhere", "--data", "none.csv", option, str(value), "--out", str(tmp_path / "o")]) == 2
    assert guess.rpartition("; ")[2] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "remedy"),
    [
        (datasets.Dataset.from_list(ROWS), "pass ds['sentence'] in place of ds"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "pass ds['sentence'] in place of ds"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "pass ds['train']['sentence'] in place of ds"),
        (ROWS, "pass [row['sentence'] for row in rows] in place of rows"),
        (iter(ROWS), "pass [row['sentence'] for row in rows] in place of rows"),
        ([{"label": 1}], "got {'label': 1}"),
    ],
)
def test_a_table_in_the_place_of_a_column(texts, remedy):
    reader = secateur.prune if not hasattr(texts, "__next__") else secateur.score
    with pytest.raises(InvalidInputError) as caught:
        reader(tiny_model("bert"), texts, scorer="contribution", tokenizer=tiny_tokenizer())
    assert str(caught.value).startswith("`texts")
    assert str(caught.value).endswith(remedy)


def test_what_the_remedies_say_is_taken():
    table = datasets.Dataset.from_list(ROWS)
    given = {"scorer": "contribution", "tokenizer": tiny_tokenizer()}
    columns = [table["sentence"], table.to_iterable_dataset()["sentence"], [row["sentence"] for row in ROWS]]
    found = [secateur.score(tiny_model("bert"), texts, **given) for texts in columns]
    assert found[0] == found[1] == found[2]


@pytest.fixture
def no_answer(monkeypatch):
    """A Hub that does not answer, and what is asked of it."""
    asked = []

    class Client:
        def head(self, url, **_):
            asked.append(url)
            time.sleep(0.2)
            raise ConnectionError("nothing there")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "get_session", Client)
    monkeypatch.setattr(hub_access, "WAIT", 0.05)
    hub_access._asked.cache_clear()
    yield asked
    hub_access._asked.cache_clear()


@pytest.mark.parametrize("call", [load_model, load_tokenizer, load_task, secateur.prune])
def test_a_name_that_cannot_be_looked_up(call, no_answer):
    start = time.perf_counter()
    with pytest.raises(InvalidInputError) as caught:
        call("someone/smal")
    assert str(caught.value) == "cannot reach the Hub for someone/smal, and there is no folder someone/smal here"
    assert time.perf_counter() - start < 2
    assert len(no_answer) == 1


def test_a_model_that_was_fetched_before_is_not_looked_up(no_answer, tmp_path, monkeypatch):
    place = tmp_path / "models--someone--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    tiny_model("bert").save_pretrained(place / "snapshots" / ("a" * 40))
    for module in (huggingface_hub.constants, hub_access.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    assert load_model("someone/small", "cpu").config.hidden_size == tiny_model("bert").config.hidden_size
    assert time.perf_counter() - start < 3


def test_a_name_that_cannot_be_looked_up_is_one_line_of_the_command(no_answer, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("sentence\ngood film\n")
    command = ["prune", "someone/smal", "--data", str(tmp_path / "texts.csv"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (
        "secateur: error: cannot reach the Hub for someone/smal, and there is no folder someone/smal here\n"
    )


def test_a_pruner_that_cannot_be_looked_up(no_answer):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="someone/pruner cannot be loaded as a MetaPruner: "):
        load_pruner("someone/pruner")
    assert time.perf_counter() - start < 2
    assert len(no_answer) == 1


NAME = "someone/small"
UNLOADED = {
    "score": lambda: secateur.score(NAME),
    "find_units": lambda: secateur.find_units(NAME),
    "find_sites": lambda: secateur.find_sites(NAME),
    "allocate": lambda: secateur.allocate(NAME, secateur.Scores({"a": [1.0]}), budget="macs=0.5"),
    "remove_": lambda: secateur.remove_(NAME, secateur.Mask({"a": [True]})),
    "gated": lambda: secateur.gated(NAME, secateur.Mask({"a": [True]})).__enter__(),
    "reconstruct_": lambda: secateur.reconstruct_(NAME, secateur.Mask({"a": [True]}), tiny_texts(4)),
    "refine_mask": lambda: secateur.refine_mask(NAME, secateur.Mask({"a": [True]}), tiny_texts(4)),
    "distill_": lambda: secateur.distill_(NAME, tiny_model("bert"), tiny_texts(24), tiny_tokenizer()),
    "teacher": lambda: secateur.distill_(tiny_model("bert"), NAME, tiny_texts(24), tiny_tokenizer()),
}


@pytest.mark.parametrize("call", UNLOADED)
def test_a_name_in_the_place_of_a_model(call):
    remedy = re.escape("load it: secateur.models.loading.load_model('someone/small')")
    parameter = "teacher" if call == "teacher" else "model"
    with pytest.raises((TypeError, ValueError), match=f"`{parameter}` must be .*{remedy}"):
        UNLOADED[call]()


def test_a_file_in_the_place_of_scores_or_a_mask():
    with pytest.raises(ValueError, match=re.escape("load it: secateur.Scores.load('scores.json')")):
        secateur.select("scores.json")
    with pytest.raises(ValueError, match=re.escape("load it: secateur.Mask.load('mask.json')")):
        secateur.remove_(tiny_model("bert"), "mask.json")
