"""Columns of texts and labels that have names of their own."""

import json
import shutil

import datasets
import pytest

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.texts.data import Columns, Task, load_task
from secateur.texts.streams import stream_texts
from tests.support.tiny import tiny_classifier, tiny_texts, tiny_tokenizer

ROWS = [
    {"id": number, "review": f"film {number}", "title": f"title {number}", "stars": number % 2, "label": 7}
    for number in range(4)
]
REVIEWS = [row["review"] for row in ROWS]
PAIRS = [(row["title"], row["review"]) for row in ROWS]


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"films.{request.param}"
    if request.param == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif request.param == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    else:
        lines = [list(ROWS[0]), *(row.values() for row in ROWS)]
        path.write_text("\n".join(({"csv": ",", "tsv": "\t"}[request.param]).join(map(str, line)) for line in lines))
    return path


def test_columns_that_are_named_are_read(file):
    assert load_task(file, columns=Columns(("review",), "stars")) == Task("films", REVIEWS, [0, 1, 0, 1])
    assert load_task(file, columns=Columns(("title", "review"))) == Task("films", PAIRS, [7] * 4)
    assert list(stream_texts(file, columns=Columns(("title", "review")))) == PAIRS


def test_columns_of_the_hub(monkeypatch):
    table = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, streaming=False: {"train": table.to_iterable_dataset() if streaming else table},
    )
    assert load_task("owner/name", columns=Columns(("review",), "stars")).labels == [0, 1, 0, 1]
    assert list(stream_texts("owner/name", columns=Columns(("review",)))) == REVIEWS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(("reviews",)), "no column 'reviews', which `text_column` names: .*; did you mean review\\?"),
        (Columns(("review", "zzz")), "no column 'zzz', which `text_column` names: found 'id', 'review'"),
        (Columns(("review",), "rating"), "no column 'rating', which `label_column` names: found"),
        (Columns(("review",), "title"), "`title` in row 1 must be a number"),
        (Columns(), "no text columns: .* --text-column"),
    ],
)
def test_columns_that_are_not_there(columns, message, file):
    with pytest.raises(InvalidInputError, match=message):
        load_task(file, columns=columns)


def test_names_that_are_none():
    for texts, label in (((), None), (("",), None), (("a", "a"), None), (("a", "b", "c"), None), (("a",), "a")):
        with pytest.raises(InvalidInputError, match="`text_column` must name"):
            Columns(texts, label)


@pytest.fixture
def folder(tmp_path):
    """A classifier, and the same texts and labels in columns of usual names and of others."""
    tiny_classifier("bert", 2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for names in (("sentence", "label"), ("review", "stars")):
        rows = [",".join(names), *(f"{text},{number % 2}" for number, text in enumerate(tiny_texts(24)))]
        (tmp_path / names[0]).mkdir()
        for split in ("train", "dev"):
            (tmp_path / names[0] / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "result", "own"),
    [
        ("finetune", "metrics", ["--epochs=1", "--out=tuned"]),
        ("evaluate", "metrics", []),
        ("distill", "relational_kl", ["--steps=1", "--against=model", "--out=taught"]),
    ],
)
def test_commands_that_train_and_evaluate_read_them(command, result, own, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    given = [command, "model", "--device=cpu", "--json", *own, "--data"]
    assert cli.main([*given, "review", "--text-column=review", "--label-column=star"]) == 2
    wrong = "no column 'star', which `label_column` names: found 'review', 'stars'; did you mean stars?"
    assert wrong in capsys.readouterr().err
    found = []
    for named in (["review", "--text-column=review", "--label-column=stars"], ["sentence"]):
        assert cli.main([*given, *named]) == 0
        found.append(json.loads(capsys.readouterr().out)[result])
        for place in ("tuned", "taught"):
            shutil.rmtree(place, ignore_errors=True)
    assert found[0] == found[1] != {}


def test_the_commands_that_score_read_them(folder, capsys):
    tmp_path, given = folder, ["score", str(folder / "model"), "--device", "cpu", "--json", "--data"]
    found = []
    for scorer in ("taylor", "contribution"):
        command = [*given[:-1], "--scorer", scorer, "--data"]
        assert cli.main([*command, str(tmp_path / "sentence")]) == 0
        found.append(capsys.readouterr().out)
        named = [str(tmp_path / "review"), "--text-column", "review", "--label-column", "stars"]
        assert cli.main([*command, *named]) == 0
        assert capsys.readouterr().out == found[-1]
    streamed = [*given, str(tmp_path / "review"), "--scorer", "contribution", "--stream", "--text-column", "review"]
    assert cli.main(streamed) == 0
    assert json.loads(capsys.readouterr().out)["num_texts"] == 24
    assert cli.main([*given, str(tmp_path / "review"), "--text-column", "a,b,c"]) == 2
    assert "`text_column` must name one column, or two with a comma" in capsys.readouterr().err
    prune = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "review"), "--text-column", "stars,review"]
    prune += ["--device", "cpu", "--scorer", "contribution", "--restore", "none", "--no-maps", "--ratio", "0.25"]
    assert cli.main([*prune, "--out", str(tmp_path / "small")]) == 0
    assert json.loads((tmp_path / "small" / "pruning_report.json").read_text())["num_texts"] == 24
