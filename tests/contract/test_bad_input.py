"""Data files and texts as they come: each is read for what it is, or refused in one line that names the file."""

import bz2
import csv
import gzip
import io
import json
import tarfile
import zipfile

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur
from secateur.errors import InvalidInputError
from secateur.finetuning.finetune import finetune
from secateur.settings import Reading
from secateur.texts.data import Task, load_task
from secateur.texts.tokenization import batches
from tests.support.tiny import decoder_tokenizer, tiny_classifier, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FILES, TEXTS = "Data files", "Texts"
CSV = "sentence,label\nfine,1\nbad,0\n"
JSONL = '{"sentence": "fine", "label": 1}\n{"sentence": "bad", "label": 0}\n'
LONG = "word " * 20_000
WRITABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def archive(kind, name, content):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as made:
            made.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as made:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


def parquet(**columns):
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns).to_parquet(buffer)
    return buffer.getvalue()


READ = [
    ("a byte order mark", "a.csv", "\ufeff" + CSV),
    ("a byte order mark in .jsonl", "a.jsonl", "\ufeff" + JSONL),
    ("CRLF line ends", "a.csv", CSV.replace("\n", "\r\n")),
    ("CR line ends", "a.csv", CSV.replace("\n", "\r")),
    ("CRLF line ends in .jsonl", "a.jsonl", JSONL.replace("\n", "\r\n")),
    ("blank lines", "a.jsonl", JSONL.replace("\n", "\n\n")),
    (".csv.gz", "a.csv.gz", gzip.compress(CSV.encode())),
    (".csv.gz with a byte order mark", "a.csv.gz", gzip.compress(("\ufeff" + CSV).encode())),
    (".tsv.gz", "a.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode())),
    (".jsonl.gz", "a.jsonl.gz", gzip.compress(JSONL.encode())),
    ("an unused column twice", "a.csv", "x,sentence,x,label\n1,fine,2,1\n1,bad,2,0\n"),
    ("an unused column without a name", "a.csv", ",sentence,label\n0,fine,1\n1,bad,0\n"),
    ("a name that looks like an address of an archive", "zip::a.csv", CSV),
    ("a name that looks like a pattern", "[a]*?.csv", CSV),
    ("a name that is no UTF-8", "a\udcff.csv", CSV),
]
REFUSED = [
    ("an empty file", "a.csv", "", "holds no rows"),
    ("a header alone", "a.csv", "sentence,label\n", "holds no rows"),
    ("blank lines alone", "a.csv", "\n\n\n", "holds no rows"),
    ("every text empty", "a.csv", 'sentence,label\n"",1\n"",0\n', "every text is empty"),
    ("the text column twice", "a.csv", "sentence,sentence,label\na,b,1\n", "more than one column 'sentence'"),
    ("the label column twice", "a.csv", "sentence,label,label\na,0,1\n", "more than one column 'label'"),
    ("a name twice in an object", "a.jsonl", '{"sentence": "a", "sentence": "b"}\n', "one name twice"),
    ("no text column", "a.csv", "Sentence,label\na,1\n", "has no text columns"),
    ("semicolons in .csv", "a.csv", CSV.replace(",", ";"), "has no text columns"),
    ("a row too long", "a.csv", "sentence,label\na,1\nb,0,7\n", "row 2 has 3 fields, the header has 2"),
    ("a row too short", "a.csv", "label,sentence\n1,a\n0\n", "row 2 has 1 fields, the header has 2"),
    ("a row too short in .tsv", "a.tsv", "label\tsentence\n1\ta\n0\n", "row 2 has 1 fields, the header has 2"),
    ("a quotation mark that does not close", "a.csv", 'sentence,label\n"fine,1\nbad,0\n', "unexpected end of data"),
    ("a label missing", "a.csv", "sentence,label\na,\nb,0\n", "`label` in row 1 is missing"),
    ("a label that is a word", "a.csv", "sentence,label\na,pos\nb,neg\n", "must be a number"),
    ("a label that is NaN", "a.csv", "sentence,label\na,nan\n", "must be a number"),
    ("a label that is infinite", "a.csv", "sentence,label\na,1e999\n", "must be a number"),
    ("a label of 401 digits", "a.csv", f"sentence,label\na,1{'0' * 400}\nb,0.5\n", "must be a number"),
    ("a label with an underscore", "a.csv", "sentence,label\na,1_0\n", "must be a number"),
    ("some labels -1", "a.csv", "sentence,label\na,-1\nb,1\n", "must be a class from 0 up"),
    ("a class of 23 digits", "a.csv", "sentence,label\na,99999999999999999999999\n", "below 100,000"),
    ("broken UTF-8", "a.csv", b"sentence,label\nfi\xffne,1\n", "is not UTF-8 text"),
    ("broken UTF-8 far down", "a.csv", CSV.encode() * 1000 + b"fi\xffne,1\n", "is not UTF-8 text"),
    ("broken UTF-8 in .jsonl", "a.jsonl", b'{"sentence": "fi\xffne"}\n', "is not UTF-8 text"),
    ("broken UTF-8 in .csv.gz", "a.csv.gz", gzip.compress(b"sentence\nfi\xffne\n"), "is not UTF-8 text"),
    ("UTF-16", "a.csv", CSV.encode("utf-16"), "is not UTF-8 text"),
    ("half of a surrogate pair", "a.jsonl", '{"sentence": "a\\ud800"}\n', "must be text"),
    ("a NUL character", "a.csv", "sentence,label\na\0b,1\n", "NUL characters"),
    (".csv.gz that is not compressed", "a.csv.gz", CSV, "Not a gzipped file"),
    (".csv.gz cut short", "a.csv.gz", gzip.compress(CSV.encode() * 100)[:60], "ended before"),
    (".csv that is compressed", "a.csv", gzip.compress(CSV.encode()), "is not UTF-8 text"),
    (".jsonl that is compressed", "a.jsonl", bz2.compress(JSONL.encode()), "is not UTF-8 text"),
    (".csv.bz2", "a.csv.bz2", bz2.compress(CSV.encode()), "be a file with one of the endings"),
    ("a zip archive named .jsonl", "a.jsonl", archive("zip", "a.jsonl", JSONL), "a.jsonl"),
    ("a tar archive named .jsonl, with `../../` in it", "a.jsonl", archive("tar", "../../escaped", JSONL), "archives"),
    ("a tar archive named .csv", "a.csv", archive("tar", "sentence,label\n", CSV), "archives"),
    ("a zip archive named .parquet", "a.parquet", archive("zip", "a", CSV), "cannot be read as .parquet"),
    ("a damaged .parquet", "a.parquet", b"PAR1" + b"x" * 99 + b"PAR1", "cannot be read as .parquet"),
    ("numbers for texts in .parquet", "a.parquet", parquet(sentence=[1, 2]), "must be text, got 1"),
    ("no JSON", "a.jsonl", "sentence\n", "row 1 is no JSON"),
    ("`null` for JSON", "a.json", "null", "row 1 must be an object, got None"),
    ("a list of numbers for JSON", "a.json", "[1, 2]", "row 1 must be an object, got 1"),
    ("JSON cut short", "a.jsonl", JSONL[:-8], "row 2 is no JSON"),
    ("JSON nested 100,000 deep", "a.json", "[" * 100_000, "cannot be read as .json"),
    ("a number for a text", "a.jsonl", '{"sentence": "a"}\n{"sentence": 2}\n', "row 2 must be text, got 2"),
    ("a text missing", "a.jsonl", '{"sentence": "a"}\n{"other": 2}\n', "row 2 must be text, got None"),
    ("a label that is true", "a.jsonl", '{"sentence": "a", "label": true}\n', "must be a number"),
]


def written(folder, name, content):
    path = folder / name
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:  # names are another matter on each system
        pytest.skip(str(error))
    return path


@pytest.mark.parametrize(("what", "name", "content"), READ, ids=[row[0] for row in READ])
def test_what_is_read(what, name, content, tmp_path, outcome):
    assert load_task(written(tmp_path, name, content)) == Task(name.split(".")[0], ["fine", "bad"], [1, 0])
    outcome(FILES, what, "read")


@pytest.mark.parametrize(("what", "name", "content", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused(what, name, content, message, tmp_path, outcome):
    (tmp_path / "in").mkdir()
    path = written(tmp_path / "in", name, content)
    with pytest.raises(InvalidInputError) as caught:
        load_task(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 300
    assert [p.name for p in tmp_path.rglob("*")] == ["in", name]  # nothing was unpacked beside it
    outcome(FILES, what, f"refused: {text.replace(str(path), name)}")


def test_labels_that_training_did_not_see(tmp_path, outcome):
    """A dev set with a higher class than the training texts: the head gets an output for it."""
    train, dev = Task("a", ["good film"] * 4, [0, 1, 0, 1]), Task("a", ["bad film"] * 2, [0, 4])
    tiny_model("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = finetune(tmp_path, train, dev, epochs=1, reading=Reading(device="cpu", progress=False))
    assert model.config.num_labels == 5
    outcome(FILES, "a class in dev that is not in train", "the model gets an output for it")
    with pytest.raises(InvalidInputError) as caught:
        finetune(
            tiny_classifier("bert", 2),
            train,
            dev,
            tokenizer=tiny_tokenizer(),
            reading=Reading(device="cpu", progress=False),
        )
    outcome(FILES, "a class that a loaded classifier has no output for", caught.value)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz", "a.parquet"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    for made in (content, b"sentence,label\n" + content, b'{"sentence": "' + content):
        path.write_bytes(made)
        try:
            assert load_task(path).texts
        except InvalidInputError as error:
            assert str(path) in str(error)  # noqa: PT017 - most are refused, not all


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(WRITABLE, st.integers(0, 9)), min_size=1))
def test_what_csv_and_json_can_write_comes_back(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    if not any(text for text, _ in rows):
        return
    with (folder / "w.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("sentence", "label"), *rows])
    (folder / "w.jsonl").write_text("".join(json.dumps({"sentence": t, "label": n}) + "\n" for t, n in rows))
    expected = Task("w", [text for text, _ in rows], [label for _, label in rows])
    assert load_task(folder / "w.csv") == load_task(folder / "w.jsonl") == expected


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["an encoder", "a decoder"])
def subject(request):
    if request.param == "an encoder":
        return request.param, tiny_model("bert"), tiny_tokenizer()
    return request.param, tiny_model("llama"), decoder_tokenizer(eos_token="<end>")


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("an empty string among others", ["", "good film"]),
        ("empty strings alone", ["", ""]),
        ("spaces alone", ["   ", "\t\n"]),
        ("padding tokens alone", ["[PAD] [PAD]", "[PAD]"]),
        ("lines of 100,000 characters", [LONG, LONG[::-1]]),
        ("words that the tokenizer does not know", ["\N{PILE OF POO}" * 9, "中文"]),
        ("a NUL character", ["a\0b", "good"]),
        ("pairs with an empty half", [("", "good"), ("bad", "")]),
    ],
)
def test_odd_texts_are_scored(what, texts, subject, outcome):
    kind, model, tokenizer = subject
    for scorer in ("contribution", "smp", "leave_one_out"):
        scores = secateur.score(
            model, texts * 2, scorer, tokenizer, reading=Reading(batch_size=1 if scorer == "smp" else 4)
        )
        assert all(bool(torch.isfinite(row).all()) for row in scores.values())
    outcome(TEXTS, f"{what}, {kind}", "scored, every score finite")


def test_an_empty_text_weighs_nothing_wherever_it_is():
    """A batch of empty texts alone is padded to one token, which counts as little as the padding beside other texts."""
    model, tokenizer = tiny_model("llama"), decoder_tokenizer(eos_token="<end>")
    alone = secateur.score(model, ["", "good film"], tokenizer=tokenizer, reading=Reading(batch_size=1))
    together = secateur.score(model, ["", "good film"], tokenizer=tokenizer, reading=Reading(batch_size=2))
    only = secateur.score(model, ["good film"], tokenizer=tokenizer)
    for site in only:
        assert torch.allclose(alone[site], together[site], atol=1e-5)
        assert torch.allclose(2 * alone[site], only[site], atol=1e-5)


def test_a_text_of_100_000_characters_is_cut_to_the_limit(outcome):
    (batch,) = batches(tiny_tokenizer(), [LONG, "good"], max_length=128)
    assert batch["input_ids"].shape == (2, 32)  # the tokenizer's own limit is lower
    outcome(TEXTS, "a text of 100,000 characters and a limit of 128 tokens", "cut to the lower of the two limits")


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("no texts", []),
        ("one string for a list", "good film"),
        ("bytes", [b"good film"]),
        ("a number among texts", ["good", 3]),
        ("None among texts", ["good", None]),
        ("texts and pairs mixed", ["good", ("bad", "film")]),
        ("a list for a pair", [["bad", "film"]]),
        ("three for a pair", [("a", "b", "c")]),
        ("half of a surrogate pair", ["good", "a\ud800"]),
        ("a number", 3),
    ],
)
def test_what_is_no_list_of_texts(what, texts, outcome):
    with pytest.raises(InvalidInputError, match=r"^`texts(\[\d\])?` must ") as caught:
        secateur.score(tiny_model("bert"), texts, tokenizer=tiny_tokenizer())
    outcome(TEXTS, what, caught.value)
