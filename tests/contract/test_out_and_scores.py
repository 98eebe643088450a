"""What the Python call and the command have in common: a whole folder, and scores that were saved before."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import secateur
from secateur import cli
from secateur.errors import InvalidInputError
from secateur.pruning_work import Pruning
from secateur.report import pruning_files, render_report
from secateur.report.reading import read_runs
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = tiny_texts(24)
READING = secateur.Reading(maps=True, device="cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, texts, and the scores that `secateur score` saves."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.csv").write_text("\n".join(["sentence", *TEXTS]) + "\n")
    data = ["--data", str(folder / "texts.csv"), "--device", "cpu"]
    scores = str(folder / "scores.json")
    assert cli.main(["score", str(folder / "model"), *data, "--scorer", "contribution", "--out", scores]) == 0
    return folder


def command(work, out, *options):
    place = ["--data", str(work / "texts.csv"), "--device", "cpu", "--out", str(out)]
    return cli.main(["prune", str(work / "model"), *place, *options])


def report_of(folder):
    report = json.loads((folder / "pruning_report.json").read_text())
    for name in ("created", "command", "scoring_seconds"):
        report.pop(name)
    return report


# --- out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_the_call_saves_is_what_the_command_saves(is_loaded, work, tmp_path):
    assert command(work, tmp_path / "command", "--scorer", "magnitude", "--restore", "none") == 0
    model = AutoModel.from_pretrained(work / "model") if is_loaded else work / "model"
    texts = (work / "texts.csv").read_text().splitlines()[1:]
    drawn = _drawn(texts)
    small, report = secateur.prune(
        model, drawn, scorer="magnitude", restore="none", reading=READING, out=tmp_path / "call"
    )
    names = [sorted(path.name for path in (tmp_path / place).iterdir()) for place in ("command", "call")]
    assert names[0] == names[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.html", "attention_maps.json"} <= {*names[0]}
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("command", "call"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert report_of(tmp_path / "call") == report_of(tmp_path / "command")
    (run,) = read_runs([tmp_path / "call"])
    assert render_report([run]) == (tmp_path / "call" / "report.html").read_text(encoding="utf-8")
    assert render_report([{**run, "loading": None}]) == report.to_html()  # it knows no folder to load
    again = AutoModel.from_pretrained(tmp_path / "call")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in small.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "call")) == len(tiny_tokenizer())


def _drawn(texts):
    """The texts in the order in which the command draws them with seed 0."""
    from secateur.texts.data import Task

    return Task("texts", texts).head(len(texts), seed=0).texts


def test_a_sentence_transformer_is_saved_as_one(work, tmp_path):
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(str(work / "model"), device="cpu")
    small, _ = secateur.prune(whole, TEXTS, scorer="magnitude", restore="none", reading=READING, out=tmp_path / "small")
    again = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert (again.encode(TEXTS[:2]) == small.encode(TEXTS[:2])).all()
    assert (tmp_path / "small" / "report.html").is_file()


def test_a_model_without_a_name_is_saved_with_the_tokenizer_it_was_given(tmp_path):
    secateur.prune(tiny_model("bert"), scorer="random", tokenizer=tiny_tokenizer(), out=tmp_path / "one")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "one")) == len(tiny_tokenizer())
    secateur.prune(tiny_model("bert"), scorer="random", out=tmp_path / "none")
    assert not (tmp_path / "none" / "tokenizer.json").exists()


def test_of_several_processes_the_first_one_saves(tmp_path):
    for is_main in (False, True):
        accelerator = SimpleNamespace(num_processes=1, is_main_process=is_main)
        reading = secateur.Reading(accelerator=accelerator)
        secateur.prune(tiny_model("bert"), scorer="random", reading=reading, out=tmp_path / "out")
        assert (tmp_path / "out").exists() == is_main


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    monkeypatch.setattr(Pruning, "score", lambda *_: pytest.fail("scored"))
    with pytest.raises(InvalidInputError, match="`out` must be a new or empty folder"):
        secateur.prune(tiny_model("bert"), scorer="random", out=tmp_path / "full")
    monkeypatch.undo()
    monkeypatch.setattr(pruning_files, "write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        secateur.prune(tiny_model("bert"), scorer="random", out=tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_saved_scores_take_the_place_of_scoring(work, tmp_path, monkeypatch):
    assert command(work, tmp_path / "scored", "--scorer", "contribution", "--no-maps") == 0
    monkeypatch.setattr("secateur.pruning_work.score", lambda *_, **__: pytest.fail("scored"))
    assert command(work, tmp_path / "given", "--scores", str(work / "scores.json"), "--no-maps") == 0
    assert report_of(tmp_path / "given") == report_of(tmp_path / "scored")
    one, other = (load_file(tmp_path / place / "model.safetensors") for place in ("scored", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    scores = secateur.Scores.load(work / "scores.json")
    _, report = secateur.prune(work / "model", scorer=scores)
    assert report.to_json()["kept_heads"] == report_of(tmp_path / "scored")["kept_heads"]
    assert (report.scorer, report.scoring_seconds) == ("contribution", 0)


def test_a_preview_takes_saved_scores(work, capsys):
    given = ["prune", str(work / "model"), "--data", str(work / "texts.csv"), "--device", "cpu", "--dry-run", "--json"]
    given += ["--units", "heads", "--budget", "macs=0.95"]
    assert cli.main([*given, "--scorer", "contribution"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert cli.main([*given, "--scores", str(work / "scores.json")]) == 0
    assert json.loads(capsys.readouterr().out) == scored


@pytest.mark.parametrize("option", [("--scorer", "random"), ("--stop", "auto"), ("--stop", "all"), ("--option", "a=1")])
def test_scores_leave_nothing_to_score(option, work, tmp_path, capsys):
    assert command(work, tmp_path / "out", "--scores", str(work / "scores.json"), *option) == 2
    assert f"`{option[0][2:]}` must be left out where there are `--scores`" in capsys.readouterr().err


def _changed(scores, change):
    site = next(iter(scores))
    values = dict(scores)
    if change == "fewer sites":
        del values[site]
    elif change == "other names":
        values = {f"x.{name}": row for name, row in values.items()}
    elif change == "more sites":
        values["encoder.layer.9.attention.self"] = values[site]
    elif change == "fewer heads":
        values[site] = values[site][:-1]
    elif change == "one gone":
        values[site] = torch.tensor([float("-inf"), *values[site][1:]])
    kinds = {site: "neurons"} if change == "another kind" else {}
    return secateur.Scores(values, kinds=kinds)


CHANGES = ["fewer sites", "other names", "more sites", "fewer heads", "one gone", "another kind"]


@pytest.mark.parametrize("change", CHANGES)
def test_scores_of_another_model_are_refused(change, work, tmp_path, capsys):
    _changed(secateur.Scores.load(work / "scores.json"), change).save(tmp_path / "other.json")
    assert command(work, tmp_path / "out", "--scores", str(tmp_path / "other.json")) == 2
    err = capsys.readouterr().err
    assert "`scores` must " in err
    assert "score this model again" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", [secateur.prune, secateur.preview])
def test_scores_that_are_given_have_no_options(call, work):
    scores = secateur.Scores.load(work / "scores.json")
    with pytest.raises(InvalidInputError, match="`zzz` must belong to a scorer"):
        call(work / "model", TEXTS, scorer=scores, zzz=3)
    with pytest.raises(InvalidInputError, match="`stop` must be 'all' or a number where there are scores"):
        call(work / "model", TEXTS, scorer=scores, reading=secateur.Reading(stop="auto"))


def test_scores_of_more_kinds_than_go(work):
    scores = secateur.score(
        AutoModel.from_pretrained(work / "model"), scorer="random", units=["heads", "neurons", "layers"]
    )
    _, report = secateur.prune(work / "model", scorer=scores)
    assert report.units.keys() == {"heads"}
    assert report.scores == scores.only([site for site in scores if scores.kinds[site] == "heads"])


def test_a_stopped_pruning_does_not_go_on_with_other_scores(work, tmp_path, monkeypatch, capsys):
    file = tmp_path / "scores.json"
    scores = secateur.Scores.load(work / "scores.json")
    with monkeypatch.context() as stopped:
        stopped.setattr(Pruning, "remove", _interrupted)
        said = []
        for sign in (1, 1, -1):
            secateur.Scores({site: sign * row for site, row in scores.items()}).save(file)
            given = ["--scores", str(file), "--no-maps", "--restore", "none"]
            assert command(work, tmp_path / "out", *given) == 130
            said.append("going on with the mask" in capsys.readouterr().err)
    assert said == [False, True, False]


def _interrupted(*_):
    raise KeyboardInterrupt
