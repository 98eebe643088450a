"""Texts that come one after the other: the same scores, read from all kinds of files, never held all at once."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
import re
import weakref

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch

import secateur
from secateur import cli
from secateur.errors import InvalidInputError
from secateur.settings import Cut, Reading
from secateur.texts.data import load_task
from secateur.texts.streams import shuffled, stream_texts
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched(str):
    """A text that can be counted while it is alive."""


def test_a_generator_gives_the_scores_of_a_list_and_is_held_batch_by_batch():
    model, tokenizer, texts = tiny_model("bert"), tiny_tokenizer(), tiny_texts(20, pairs=True)
    options = {"tokenizer": tokenizer, "reading": Reading(batch_size=8)}
    for scorer in ("contribution", "leave_one_out"):
        listed = secateur.score(model, texts, scorer, **options)
        found = secateur.score(model, iter(texts), scorer, **options)
        assert found.num_texts == listed.num_texts
        for site in listed:  # a list's texts share batches by their length, which rounds otherwise
            torch.testing.assert_close(found[site], listed[site], atol=1e-6, rtol=0)
    alive: weakref.WeakSet[Watched] = weakref.WeakSet()
    most = 0

    def endless():
        nonlocal most
        for text in itertools.cycle(tiny_texts(99)):
            watched = Watched(text)
            alive.add(watched)
            most = max(most, len(alive))
            yield watched

    scores = secateur.score(model, endless(), tokenizer=tokenizer, reading=Reading(batch_size=8, stop=400))
    assert scores.num_texts == 400
    assert 8 <= most <= 24  # equal texts count once
    settled = secateur.score(model, endless(), tokenizer=tokenizer, reading=Reading(batch_size=8, stop="auto"))
    assert settled.agreement >= 0.95
    assert settled.num_texts >= 32
    short = secateur.score(model, iter(tiny_texts(20)), tokenizer=tokenizer, reading=Reading(batch_size=8, stop="auto"))
    assert (short.num_texts, short.agreement) == (20, 1.0)


def test_a_column_or_an_array_is_a_list_and_a_table_is_not():
    model, texts, tokenizer = tiny_model("bert"), tiny_texts(8), tiny_tokenizer()
    expected = secateur.score(model, texts, tokenizer=tokenizer)
    table = pandas.DataFrame({"sentence": texts, "label": [0, 1] * 4})
    for column in (table["sentence"], table["sentence"].to_numpy(), tuple(texts)):
        assert secateur.score(model, column, tokenizer=tokenizer) == expected
    mask = secateur.select(expected, 0.5)
    assert secateur.refine_mask(model, mask, table["sentence"], tokenizer, steps=2)
    named = r"pass ds\['sentence'\]"
    for whole, remedy in ((table, named), ({"sentence": texts}, named), (tokenizer(texts), "such as table")):
        for function in (secateur.score, secateur.prune):
            with pytest.raises(InvalidInputError, match=rf"`texts` must be one column of a table.* {remedy}"):
                function(model, whole, tokenizer=tokenizer)
    classifier, numbers = tiny_classifier("bert"), [0, 1] * 4
    for labels in (table.to_numpy(), torch.tensor(3).numpy()):
        with pytest.raises(InvalidInputError, match="`labels` must be a list with a number for each text"):
            secateur.score(classifier, texts, "taylor", tokenizer, labels=labels)
    assert secateur.score(model, texts, tokenizer=tokenizer, labels=[0]) == expected  # it needs none
    taught = secateur.score(classifier, texts, "taylor", tokenizer, labels=numbers)
    for labels in (table["label"], table["label"].to_numpy(), list(table["label"].to_numpy())):
        assert secateur.score(classifier, texts, "taylor", tokenizer, labels=labels) == taught


def test_pruning_with_a_generator():
    model, tokenizer, texts = tiny_model("bert"), tiny_tokenizer(), tiny_texts(40)
    _, listed = secateur.prune(model, texts, tokenizer=tokenizer, reading=Reading(maps=True))
    _, streamed = secateur.prune(model, iter(texts), tokenizer=tokenizer, reading=Reading(maps=True))
    assert streamed.mask == listed.mask
    assert streamed.num_texts == 40
    assert streamed.attention_maps.to_json() == listed.attention_maps.to_json()
    with pytest.raises(InvalidInputError, match="in a list"):
        secateur.prune(model, iter(texts), tokenizer=tokenizer, cut=Cut(refine=1))


@pytest.mark.parametrize("texts", [iter([]), iter(["good", ("good", "bad")]), iter(["good", 5]), 7])
def test_other_texts_are_refused(texts):
    with pytest.raises(InvalidInputError, match="texts"):
        secateur.score(tiny_model("bert"), texts, tokenizer=tiny_tokenizer())


ROWS = [{"sentence": f'text "{n}", {n}', "label": n % 2} for n in range(7)]


def written(folder, name, rows=ROWS):
    file = folder / name
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    if ".jsonl" in name:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif ".tsv" in name:
        content = "".join(f"{s}\t{n}\n" for s, n in [("sentence", "label"), *(row.values() for row in rows)])
    else:
        quoted = [('"' + row["sentence"].replace('"', '""') + '"', row["label"]) for row in rows]
        content = "".join(f"{s},{n}\n" for s, n in [("sentence", "label"), *quoted])
    file.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return file


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"])
def test_files_stream_the_texts_that_they_load(tmp_path, name):
    file = written(tmp_path, name)
    assert list(stream_texts(file)) == load_task(file).texts == [row["sentence"] for row in ROWS]
    drawn = list(stream_texts(file, seed=1))
    assert drawn != load_task(file).texts
    assert sorted(drawn) == load_task(file).texts
    assert drawn == list(stream_texts(file, seed=1))


def test_shards_are_read_in_order_by_a_folder_or_a_pattern(tmp_path):
    written(tmp_path, "train-00001-of-00002.parquet", ROWS[4:])
    written(tmp_path, "train-00000-of-00002.parquet", ROWS[:4])
    written(tmp_path, "dev.parquet", ROWS[:1])
    expected = [row["sentence"] for row in ROWS]
    assert list(stream_texts(tmp_path)) == expected
    assert list(stream_texts(str(tmp_path / "train-*.parquet"))) == expected
    assert list(stream_texts(tmp_path, "dev")) == expected[:1]
    with pytest.raises(InvalidInputError, match="holds no test file"):
        next(stream_texts(tmp_path, "test"))


def test_texts_that_know_their_number_are_not_all_read():
    class Lazy:
        def __len__(self):
            return 1000

        def __iter__(self):
            for number, text in enumerate(tiny_texts(8) * 125):
                assert number < 8
                yield text

    found = secateur.score(
        tiny_model("bert"), Lazy(), "contribution", tiny_tokenizer(), reading=Reading(stop=4, batch_size=4)
    )
    assert found.num_texts == 4


@pytest.mark.parametrize("name", ["train-00000-of-00001-a9a1f2c3d4e5f607.jsonl", "train-0.jsonl", "train-0001.jsonl"])
def test_other_names_of_shards(tmp_path, name):
    written(tmp_path, name, ROWS)
    assert list(stream_texts(tmp_path)) == [row["sentence"] for row in ROWS]


@pytest.mark.parametrize(
    "more", ["train.jsonl", "train.csv.gz", "train-00000-of-00001.csv", "train-00000-of-00001.csv.gz"]
)
def test_texts_in_two_forms_are_not_read_twice(tmp_path, more):
    written(tmp_path, "train.csv", ROWS)
    written(tmp_path, more, ROWS)
    with pytest.raises(InvalidInputError, match=f"holds more than one train file .*{re.escape(more)}"):
        next(stream_texts(tmp_path))


def test_a_split_has_the_first_of_its_names(tmp_path):
    for name, rows in (("dev.csv", ROWS[:1]), ("validation.csv", ROWS[1:]), ("validation-old.csv", ROWS[2:])):
        written(tmp_path, name, rows)
    assert list(stream_texts(tmp_path, "dev")) == load_task(tmp_path, "dev").texts == [ROWS[0]["sentence"]]


def test_hub_ids_stream_without_a_download(monkeypatch):
    asked = {}

    def load_dataset(repository, config, streaming):
        asked.update(repository=repository, config=config, streaming=streaming)
        return {"train": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(stream_texts("glue/sst2")) == [row["sentence"] for row in ROWS]
    assert asked == {"repository": "nyu-mll/glue", "config": "sst2", "streaming": True}
    with pytest.raises(InvalidInputError, match="has no dev split: found train"):
        next(stream_texts("glue/sst2", "dev"))

    def fail(*args, **kwargs):
        raise ConnectionError("cannot reach it\nnow")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InvalidInputError, match=r"'glue/sst2' is no local file or folder.*not give it.*reach it now"):
        next(stream_texts("glue/sst2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence": "good"}\n{"sentence": 5}\n', "must be text in row 2"),
        ('{"sentence": "good"}\n[1]\n', "row 2 must be an object"),
        ('{"sentence": "good"}\n{"sent', "row 2 is no JSON"),
        ('{"sentence": "good", "sentence": "bad"}\n', "row 1 is no JSON: an object has one name twice"),
        ('{"sentence": "a\0b"}\n', "NUL characters"),
        ('{"title": "good"}\n', "has no text columns"),
        ("", "holds no rows"),
    ],
)
def test_rows_that_are_no_texts_are_named(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        list(stream_texts(file))


def test_a_text_may_be_longer_than_csv_takes_by_itself(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("sentence\n" + "good " * 40_000 + "\nbad\n")
    limit = csv.field_size_limit()
    texts = stream_texts(file)
    assert len(next(texts)) == 200_000
    assert csv.field_size_limit() == limit  # between two rows too
    assert list(texts) == ["bad"]


def test_shuffling_reads_no_further_ahead_than_its_buffer():
    source = iter(range(1000))
    drawn = shuffled(source, random.Random(0), buffer=10)
    first = [next(drawn) for _ in range(100)]
    assert next(source) <= 112
    assert len(set(first)) == 100
    assert first != sorted(first)


def test_the_command_line_streams(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for number in range(2):
        rows = [{"text": text} for text in tiny_texts(30, seed=number)]
        written(tmp_path, f"part-{number}.jsonl", rows)
    command = [str(tmp_path / "model"), "--data", str(tmp_path / "part-*.jsonl"), "--stream", "--json"]
    assert cli.main(["score", *command]) == 0
    assert json.loads(capsys.readouterr().out)["num_texts"] == 60
    assert cli.main(["prune", *command, "--texts", "40", "--stop", "auto", "--out", str(tmp_path / "out")]) == 0
    assert 32 <= json.loads(capsys.readouterr().out)["num_texts"] <= 40
    assert cli.main(["score", *command, "--scorer", "taylor"]) == 2
    assert "`stream` must not be given with scorer taylor, which needs labels" in capsys.readouterr().err
