"""Tasks from files, folders and the Hub, and texts to batches. Real GLUE files: see `shared_data`."""

import gzip
import os
from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertTokenizer

from secateur.errors import InvalidInputError
from secateur.texts.data import Task, load_task
from secateur.texts.tokenization import batches, check_texts, tokenize
from tests.support.tiny import decoder_tokenizer

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
SST2 = "sentence\tlabel\na good film\t1\na bad film\t0\n"


@pytest.fixture
def no_network(monkeypatch):
    """Fail at once where something asks the Hub."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"asked the Hub for {args}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture
def bert_tokenizer(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]))
    return BertTokenizer(str(vocabulary), model_max_length=12)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("toy.tsv", SST2),
        ("toy.TSV", SST2),
        ("toy.tsv.gz", SST2),
        ("toy.tsv", "\ufeff" + SST2.replace("\n", "\r\n")),
        ("toy.tsv", SST2 + "\n\n"),
        ("toy.csv", 'sentence,label\n"a good film",1\na bad film,0\n'),
        ("toy.csv", ",label,sentence,more,more\n0,1,a good film,x,\n1,0,a bad film,3,NA\n"),
        ("toy.csv.gz", "text,label\na good film,1\na bad film,0\n"),
        ("toy.jsonl", '{"text": "a good film", "label": 1}\n{"text": "a bad film", "label": 0}\n'),
        ("toy.jsonl.gz", '\ufeff{"text": "a good film", "label": 1}\r\n{"text": "a bad film", "label": 0}\r\n'),
        ("toy.json", '[{"text": "a good film", "label": 1}, {"text": "a bad film", "label": 0}]'),
    ],
)
def test_every_text_format_gives_the_same_task(tmp_path, name, content, no_network, capfd):
    task = load_task(write(tmp_path / name, content), need_labels=True)
    assert task == Task("toy", ["a good film", "a bad film"], [1, 0])
    assert all(type(label) is int for label in task.labels)
    assert capfd.readouterr() == ("", "")


def test_parquet_with_class_labels(tmp_path):
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    rows = datasets.Dataset.from_dict({"sentence": ["x", "y"], "label": [1, 0]}, datasets.Features(features))
    rows.to_parquet(tmp_path / "toy.parquet")
    assert load_task(tmp_path / "toy.parquet") == Task("toy", ["x", "y"], [1, 0])


def test_texts_stay_the_strings_they_are(tmp_path):
    texts = ["NA", "null", "12", "1e3", "", "None", 'a "quoted" word', '"open', "2020-01-01", " spaced ", "crème"]
    tsv = "sentence\tlabel\n" + "".join(f"{text}\t0\n" for text in texts)
    assert load_task(write(tmp_path / "a.tsv", tsv)).texts == texts
    numbers = "text,id\n12,1\n007,x\n"
    assert load_task(write(tmp_path / "a.csv", numbers)) == Task("a", ["12", "007"])
    quoted = 'text,label\n"one, ""two""\nthree",0\n'
    assert load_task(write(tmp_path / "b.csv", quoted)).texts == ['one, "two"\nthree']


@pytest.mark.parametrize(
    "columns",
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")],
)
def test_pairs_in_the_order_of_the_task_not_of_the_file(tmp_path, columns):
    content = f"{columns[1]}\t{columns[0]}\nsecond\tfirst\n"
    task = load_task(write(tmp_path / "a.tsv", content))
    assert task.is_pair
    assert task.texts == [("first", "second")]
    assert task.labels is None


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["0", "1"], [0, 1]),
        (["5.0", "3.8"], [5.0, 3.8]),
        (["1.0", "0.0"], [1.0, 0.0]),
        (["5", "3.8"], [5.0, 3.8]),
        (["-1", "-1"], None),
        (["-1.0", "-1.0"], None),
        (["-0.5", "1.5"], [-0.5, 1.5]),
    ],
)
def test_labels_are_what_the_file_types(tmp_path, typed, expected):
    tsv = write(tmp_path / "a.tsv", "sentence\tlabel\n" + "".join(f"x\t{label}\n" for label in typed))
    jsonl = write(tmp_path / "a.jsonl", "".join(f'{{"text": "x", "label": {label}}}\n' for label in typed))
    for task in (load_task(tsv), load_task(jsonl)):
        assert task.labels == expected
        assert [type(x) for x in task.labels or []] == [type(x) for x in expected or []]


def test_max_rows_keeps_the_first_and_the_kind_of_the_labels(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel\nx\t5\ny\t4\nz\t2.5\n")
    assert load_task(path, max_rows=2) == Task("a", ["x", "y"], [5.0, 4.0])
    assert load_task(path, max_rows=9).labels == [5.0, 4.0, 2.5]


def test_a_name_with_wildcards_is_only_a_name(tmp_path):
    write(tmp_path / "a1" / "x.tsv", "sentence\nwrong\n")
    assert load_task(write(tmp_path / "a[1]" / "*.tsv", "sentence\nright\n")).texts == ["right"]


def test_local_files_leave_nothing_behind(tmp_path, monkeypatch):
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    for name in ("a.tsv", "a.tsv.gz"):
        load_task(write(tmp_path / name, SST2))
    assert not cache.exists()
    assert not list(temporary.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "a.tsv.gz", "temporary"]


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.tsv", "train"),
        ("dev.tsv.gz", "dev"),
        ("validation.tsv", "dev"),
        ("valid.tsv", "dev"),
        ("test.tsv", "test"),
        ("test_matched.tsv", "test"),
    ],
)
def test_folder_finds_the_split_and_gives_its_name(tmp_path, name, split):
    write(tmp_path / "cola" / name, SST2)
    write(tmp_path / "cola" / "README.md", "no data")
    assert load_task(tmp_path / "cola", split).name == "cola"
    assert load_task(tmp_path / "cola" / name, "dev").name == "cola"


def test_folder_prefers_test_over_test_matched(tmp_path):
    write(tmp_path / "test_matched.tsv", "sentence\nmatched\n")
    write(tmp_path / "test.tsv", "sentence\nplain\n")
    assert load_task(tmp_path, "test").texts == ["plain"]


def test_folder_errors(tmp_path):
    write(tmp_path / "train.tsv", SST2)
    with pytest.raises(InvalidInputError, match=r"holds no dev file: expected dev or validation or valid"):
        load_task(tmp_path, "dev")
    write(tmp_path / "train.csv", "text\nx\n")
    with pytest.raises(InvalidInputError, match=r"more than one train file \(train.csv, train.tsv\)"):
        load_task(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", r"a\.tsv holds no rows"),
        ("a.tsv", "sentence\tlabel\n", r"a\.tsv holds no rows"),
        ("a.tsv.gz", "", r"a\.tsv\.gz holds no rows"),
        ("a.jsonl", "", r"a\.jsonl holds no rows"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.tsv", "words\tlabel\nx\t1\n", r"no text columns: expected `sentence`.*found 'words', 'label'"),
        ("a.jsonl", '{"words": "x"}\n', r"no text columns: expected `sentence`.*found 'words'"),
        ("a.tsv", "sentence\tsentence\nx\ty\n", r"more than one column 'sentence'"),
        ("a.tsv", "sentence\tlabel\nx\t1\n\t\n", r"`label` in row 2 is missing"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", r"row 2 has 1 fields, the header has 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', r"`label` in row 2 is missing"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n{"text": "y"}\n', r"`label` in row 2 is missing"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\tgood\n", r"`label` in row 2 must be a number, 0 to n - 1.*got 'good'"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\tnan\n", r"`label` in row 2 must be a number.*got 'nan'"),
        ("a.jsonl", '{"text": "x", "label": true}\n', r"`label` in row 1 must be a number.*got True"),
        (
            "a.tsv",
            "sentence\tlabel\nx\t1\ny\t-1\n",
            r"`label` in row 2 must be a class from 0 up, below 100,000, got -1",
        ),
        ("a.tsv", "sentence\tlabel\n\t1\n\t0\n", r"every text is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', r"`text` in row 2 must be text, got None"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": 3}\n',
            r"`text` in row 2 must be text, got 3",
        ),
        ("a.tsv", "sentence\tlabel\nx\ty\t1\n", r"row 1 has 3 fields, the header has 2"),
        ("a.tsv", "sentence\tlabel\nx\t1\nx\ty\t1\n", r"row 2 has 3 fields, the header has 2"),
        ("a.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", r"a\.tsv is not UTF-8 text: .*0xe9"),
        ("a.csv.gz", b"sentence,label\nx,1\ncaf\xe9,1\n", r"a\.csv\.gz is not UTF-8 text: .*0xe9"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": 1}\n', r"a\.jsonl is not UTF-8 text: .*0xe9"),
        ("a.jsonl", "no json\n", r"a\.jsonl: row 1 is no JSON: Expecting value"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as \.parquet"),
        ("a.txt", "x\n", r"be a file with one of the endings \.csv, \.tsv"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_file(tmp_path, name, content, message, capfd):
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_task(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_parquet_without_rows(tmp_path):
    datasets.Dataset.from_dict({"text": [], "label": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InvalidInputError, match=r"a\.parquet"):
        load_task(tmp_path / "a.parquet")


def test_labels_can_be_demanded(tmp_path):
    for content, found in (
        ("sentence\tmark\nx\t1\n", ", found 'sentence', 'mark'; "),
        ("sentence\tlabel\nx\t-1\n", ""),
    ):
        path = write(tmp_path / "a.tsv", content)
        assert load_task(path).labels is None
        with pytest.raises(InvalidInputError, match=f"has no labels; this step needs a `label` column{found}"):
            load_task(path, need_labels=True)


def test_bad_arguments(tmp_path):
    with pytest.raises(InvalidInputError, match="`split` must be train, dev or test, got 'validation'"):
        load_task(tmp_path, "validation")
    with pytest.raises(InvalidInputError, match="`max_rows` must be a whole number from 1, got 0"):
        load_task(tmp_path, max_rows=0)
    with pytest.raises(InvalidInputError, match="`data` must name a file, a folder or a Hub id, got ''"):
        load_task("")


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    ["missing.tsv", "owner/missing.csv", "a/b.jsonl.gz", "./owner", "../owner/name", "/owner", "~/owner", Path("o/n")],
)
def test_a_missing_path_is_named_and_the_hub_not_asked(data, no_network):
    with pytest.raises(InvalidInputError, match=r"`data` must name a file or a folder that exists, got '[^;]*'$") as e:
        load_task(data)
    assert str(data) in str(e.value)


@pytest.mark.parametrize("data", ["sst2", "a/b/c", "owner/name:", "owner name/x"])
def test_what_is_neither_path_nor_hub_id(data, no_network):
    with pytest.raises(InvalidInputError, match="a Hub id looks like glue/sst2, owner/name or owner/name:config"):
        load_task(data)


@pytest.mark.parametrize(
    ("data", "asked", "name"),
    [
        ("glue/sst2", ("nyu-mll/glue", "sst2"), "sst2"),
        ("nyu-mll/glue:sst2", ("nyu-mll/glue", "sst2"), "sst2"),
        ("owner/name", ("owner/name", None), "owner/name"),
        ("owner/name:config", ("owner/name", "config"), "owner/name:config"),
    ],
)
def test_hub_ids(monkeypatch, data, asked, name):
    calls = []
    columns = {"idx": [0, 1, 2], "sentence": ["x", "y", "z"]}
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({**columns, "label": [0, 1, 1]}),
        validation_matched=datasets.Dataset.from_dict({**columns, "label": [1, 0, 0]}),
        test=datasets.Dataset.from_dict({**columns, "label": [-1, -1, -1]}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: calls.append(args) or splits)
    assert load_task(data, max_rows=2) == Task(name, ["x", "y"], [0, 1])
    assert load_task(data, "dev").labels == [1, 0, 0]
    assert load_task(data, "test").labels is None
    assert calls == [asked] * 3
    with pytest.raises(InvalidInputError, match="has no labels"):
        load_task(data, "test", need_labels=True)
    del splits["test"]
    with pytest.raises(InvalidInputError, match=rf"{data} has no test split: found train, validation_matched"):
        load_task(data, "test")


def test_a_failing_hub_is_one_line_with_the_id_and_a_remedy(monkeypatch):
    def fail(*args):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InvalidInputError, match=r"'owner/name' is no local file or folder.*Couldn't reach it on.*local"
    ):
        load_task("owner/name")


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "glue" / "sst2" / "train.tsv", SST2)
    assert len(load_task("glue/sst2")) == 2


# --- Task ------------------------------------------------------------------------------------------------------------


def test_task_kinds():
    assert Task("t", ["a", "b"], [0, 2]).num_labels == 3
    assert Task("t", ["a"], [0]).num_labels == 2
    regression = Task("t", [("a", "b")], [2.5])
    assert regression.is_regression
    assert regression.is_pair
    assert regression.num_labels == 1
    bare = Task("t", ["a"])
    assert not bare.is_regression
    assert not bare.is_pair
    with pytest.raises(InvalidInputError, match="`task` must have labels, got 't'; give data with a `label` column"):
        _ = bare.num_labels


def test_head_takes_the_first_or_a_seeded_draw():
    task = Task("t", [f"text {i}" for i in range(50)], list(range(50)))
    assert task.head(3).labels == [0, 1, 2]
    assert task.head(99) == task
    drawn = task.head(10, seed=1)
    assert drawn == task.head(10, seed=1)
    assert drawn != task.head(10, seed=2)
    assert len(set(drawn.labels)) == 10
    assert drawn.texts == [f"text {label}" for label in drawn.labels]
    assert Task("t", ["a", "b"]).head(1).labels is None
    with pytest.raises(InvalidInputError, match="`n` must be at least 1, got 0"):
        task.head(0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], r"`labels` must hold one label for each of the 2 texts, got 1"),
        ([0, -1], r"`labels\[1\]` must be a class from 0 up, below 100,000, got -1"),
        ([0, "1"], r"`labels\[1\]` must be a finite number, got '1'"),
        ([0, True], r"`labels\[1\]` must be a finite number, got True"),
        ([0.5, float("nan")], r"`labels\[1\]` must be a finite number, got nan"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(InvalidInputError, match=message):
        Task("t", ["a", "b"], labels)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"`texts` must hold at least one text"),
        ("a film", r"`texts` must be a list of strings or of pairs"),
        (["a", 3], r"`texts\[1\]` must be a string or a tuple of two strings.*got 3"),
        ([("a", "b"), ("a", None)], r"`texts\[1\]` must be a string or a tuple"),
        ([("a", "b"), ("a", "b", "c")], r"`texts\[1\]` must be a string or a tuple"),
        (["a", "b", ("a", "b")], r"`texts\[2\]` must be of the kind of the first text"),
    ],
)
def test_bad_texts_are_refused_everywhere(texts, message, bert_tokenizer):
    calls = [check_texts, lambda t: Task("t", t), lambda t: tokenize(bert_tokenizer, t)]
    for call in [*calls, lambda t: batches(bert_tokenizer, t)]:
        with pytest.raises(InvalidInputError, match=message):
            call(texts)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_tokenize_gives_lists_of_each_texts_own_length(bert_tokenizer):
    encoding = tokenize(bert_tokenizer, ["a good film", "bad"])
    assert encoding["input_ids"] == [[2, 5, 6, 8, 3], [2, 7, 3]]
    pair = tokenize(bert_tokenizer, [("good", "bad film")])
    assert pair["input_ids"] == [[2, 6, 3, 7, 8, 3]]
    assert pair["token_type_ids"] == [[0, 0, 0, 1, 1, 1]]


def test_texts_are_cut_at_the_lower_limit(bert_tokenizer):
    assert len(tokenize(bert_tokenizer, ["film " * 50], max_length=8)["input_ids"][0]) == 8
    assert len(tokenize(bert_tokenizer, ["film " * 50], max_length=512)["input_ids"][0]) == 12


def test_batches_keep_the_order_and_pad_to_their_own_longest(bert_tokenizer):
    made = batches(bert_tokenizer, ["a good film", "bad", "", "film"], batch_size=2)
    assert [batch["input_ids"].tolist() for batch in made] == [
        [[2, 5, 6, 8, 3], [2, 7, 3, 0, 0]],
        [[2, 3, 0], [2, 8, 3]],
    ]
    assert made[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert type(made[0]) is dict
    assert all(tensor.dtype == torch.int64 for tensor in made[0].values())
    assert [batch["input_ids"].tolist() for batch in made[1:]] == [made[1]["input_ids"].tolist()]
    assert batches(bert_tokenizer, ["bad"], device="meta")[0]["input_ids"].device.type == "meta"


def test_batches_refuse_bad_sizes(bert_tokenizer):
    with pytest.raises(InvalidInputError, match="`batch_size` must be a whole number from 1, got 0"):
        batches(bert_tokenizer, ["a"], batch_size=0)
    for call in (batches, tokenize):
        with pytest.raises(InvalidInputError, match="`max_length` must be a whole number from 4, got 3"):
            call(bert_tokenizer, ["a"], max_length=3)


def test_a_tokenizer_without_padding_pads_with_the_end_token_and_comes_back():
    tokenizer = decoder_tokenizer(eos_token="<end>")
    made = batches(tokenizer, ["a good film", "bad"])
    assert made[0]["input_ids"].tolist() == [[1, 2, 4], [3, 0, 0]]
    assert made[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert tokenizer.pad_token is None
    with pytest.raises(InvalidInputError, match="`tokenizer` must have a padding or an end-of-sequence token"):
        batches(decoder_tokenizer(), ["a"])


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE)
def test_real_glue_files_load_row_for_row(name):
    files = sorted((SHARED / "data" / name).glob("*.tsv"))
    if not files:
        pytest.skip(f"no GLUE files in {SHARED / 'data' / name}; SECATEUR_SHARED names another place")
    for path in files:
        lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
        task = load_task(path, need_labels=True)
        assert task.name == (path.parent.name if path.stem != "test_mismatched" else path.stem)
        assert len(task) == len(lines)
        assert task.is_pair == (name not in ("cola", "sst2"))
        assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
        texts = ["\t".join(text) if task.is_pair else text for text in task.texts]
        assert texts == [line.rpartition("\t")[0] for line in lines]
        assert [str(label) for label in task.labels] == [line.rpartition("\t")[2] for line in lines]
