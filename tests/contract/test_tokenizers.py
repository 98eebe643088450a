"""A folder without tokenizer files: the original's tokenizer is taken, or the folder is refused; none is made up."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, BertTokenizer

import secateur
from secateur import cli
from secateur.errors import InvalidInputError
from secateur.finetuning.finetune import finetune
from secateur.models.loading import find_tokenizer, load_model, load_tokenizer
from secateur.settings import Reading
from secateur.texts.data import Task
from secateur.texts.tokenization import tokenize
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = tiny_texts(8)
READING = Reading(device="cpu")
REMEDY = "has no tokenizer files that know words; save the original's beside it"


def without_tokenizer(folder):
    for file in (*folder.glob("tokenizer*"), *folder.glob("special_tokens_map*")):
        file.unlink()
    return folder


def change_recipe(folder, **values):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["head_pruning"].update(values)
    file.write_text(json.dumps(config))


def pruned(source, out):
    """A pruned folder that holds the model alone, as folders were saved before."""
    model, _ = secateur.prune(source, TEXTS, reading=READING)
    model.save_pretrained(out)
    return without_tokenizer(out)


def run(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([*map(str, arguments)])
    return code, capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    tiny_model("bert").save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    pruned(root / "dense", root / "small")
    return root


@pytest.fixture
def dense(made, tmp_path):
    return shutil.copytree(made / "dense", tmp_path / "dense")


@pytest.fixture
def small(made, dense, tmp_path):
    folder = shutil.copytree(made / "small", tmp_path / "small")
    change_recipe(folder, base_model=str(dense))
    return folder


@pytest.fixture
def data(tmp_path):
    lines = [f"{text},{number % 2}" for number, text in enumerate(tiny_texts(24))]
    (tmp_path / "train.csv").write_text("\n".join(["sentence,label", *lines]))
    return tmp_path / "train.csv"


def ids(tokenizer):
    return tokenizer(TEXTS)["input_ids"]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_original_s_tokenizer_is_taken(small):
    expected = ids(tiny_tokenizer())
    for load in (load_tokenizer, find_tokenizer):
        assert ids(load(small)) == expected
    model = load_model(small, "cpu")
    given = secateur.score(model, TEXTS, "contribution", tokenizer=tiny_tokenizer())
    assert secateur.score(model, TEXTS, "contribution") == given


def test_commands_take_the_original_s_tokenizer(small, data, tmp_path, capsys):
    given = secateur.score(load_model(small, "cpu"), tiny_texts(24), "contribution", tokenizer=tiny_tokenizer())
    own = ["--data", data, "--device", "cpu", "--scorer", "contribution", "--out", tmp_path / "scores.json"]
    assert run(capsys, "score", small, *own)[0] == 0
    assert secateur.Scores.load(tmp_path / "scores.json") == given


@pytest.mark.parametrize("command", ["prune", "distill", "finetune", "export"])
def test_commands_save_the_tokenizer_and_what_reads_images_and_speech(command, small, data, tmp_path, capsys):
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in names:
        (small / name).write_text(f'{{"size": 16, "of": "{name}"}}')
    own = {
        "prune": ["--no-maps"], "distill": ["--steps", "1"], "finetune": ["--epochs", "1"],
        "export": ["--format", "standalone"],
    }[command]  # fmt: skip
    texts = [] if command == "export" else ["--data", data, "--device", "cpu"]
    code, error = run(capsys, command, small, *texts, *own, "--out", tmp_path / "out")
    assert code == 0, error
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "out")) == ids(tiny_tokenizer())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])  # transformers makes one up, or raises
def test_an_original_that_is_not_here_is_refused_with_the_remedy(kind, dense, data, tmp_path, capsys):
    folder = tmp_path / kind
    tiny_model(kind).save_pretrained(folder)
    with pytest.raises(InvalidInputError, match=REMEDY):
        load_tokenizer(folder)
    with pytest.raises(InvalidInputError, match=REMEDY):
        secateur.prune(folder, TEXTS, reading=READING)
    assert find_tokenizer(folder) is None
    code, error = run(capsys, "prune", folder, "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, len(error.splitlines())) == (2, 1)
    assert f"{folder} {REMEDY}: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained('{folder}')" in error
    assert not (tmp_path / "out").exists()


def test_a_pruned_folder_whose_original_is_gone_says_what_it_was(small, dense, data, tmp_path, capsys):
    shutil.rmtree(dense)
    for command in (["score"], ["finetune", "--out", tmp_path / "out"]):
        code, error = run(capsys, command[0], small, "--data", data, "--device", "cpu", *command[1:])
        assert code == 2
        assert REMEDY in error
        assert f"(pruned from '{dense}')" in error
    with pytest.raises(InvalidInputError, match=REMEDY):
        finetune(small, Task("films", TEXTS, [0, 1] * 4), reading=READING)
    with pytest.raises(InvalidInputError, match=REMEDY):
        secateur.score(load_model(small, "cpu"), TEXTS)


def test_an_original_in_the_cache_of_the_hub_is_taken(small, dense, tmp_path, monkeypatch):
    """Tests run offline, and what a recipe names is not fetched anyway."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    change_recipe(small, base_model="someone/original")
    with pytest.raises(InvalidInputError, match=r"\(pruned from 'someone/original'\)"):
        load_tokenizer(small)
    repository = tmp_path / "cache" / "models--someone--original"
    shutil.copytree(dense, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in (small, "someone/original"):
        assert ids(load_tokenizer(name)) == ids(tiny_tokenizer())
    without_tokenizer(repository / "snapshots" / ("a" * 40))
    with pytest.raises(InvalidInputError, match=f"^someone/original {REMEDY}.*push_to_hub"):
        load_tokenizer("someone/original")
    with pytest.raises(InvalidInputError, match=REMEDY):
        load_tokenizer(small)


def test_originals_of_originals(small, tmp_path):
    smaller = pruned(small, tmp_path / "smaller")
    assert json.loads((smaller / "config.json").read_text())["head_pruning"]["base_model"] == str(small)
    assert ids(load_tokenizer(smaller)) == ids(tiny_tokenizer())
    change_recipe(small, base_model=str(smaller))  # round and round
    with pytest.raises(InvalidInputError, match=REMEDY):
        load_tokenizer(small)


def test_a_model_of_another_vocabulary_is_no_original(small, dense):
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "vocab_size": 98}))
    with pytest.raises(InvalidInputError, match=REMEDY):
        load_tokenizer(small)


@pytest.mark.parametrize("named", [{"a": 1}, "", "BertModel", "../nowhere", "/etc", 3])
def test_what_a_recipe_names_may_be_anything(named, small):
    change_recipe(small, base_model=named)
    with pytest.raises(InvalidInputError, match=REMEDY):
        load_tokenizer(small)


def test_a_small_tokenizer_that_has_its_files_is_one(small):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "c", "g", "t"]
    (small / "vocab.txt").write_text("\n".join(words))
    assert load_tokenizer(small)("c a t")["input_ids"] == [2, 6, 5, 8, 3]


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    assert len(load_tokenizer(tmp_path)("good")["input_ids"]) == 6


def test_one_that_was_made_up_elsewhere_is_refused():
    with pytest.raises(InvalidInputError, match="`tokenizer` must know words, got BertTokenizer of 5 tokens; "):
        tokenize(BertTokenizer(), TEXTS)
    with pytest.raises(InvalidInputError, match="`tokenizer` must know words"):
        secateur.score(tiny_model("bert"), TEXTS, tokenizer=BertTokenizer())


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "units"), [("contribution", "heads"), ("magnitude", "heads"), ("block_influence", "layers")]
)
def test_a_pruned_model_is_saved_with_its_tokenizer(scorer, units, dense, tmp_path):
    model, _ = secateur.prune(
        dense, None if scorer == "magnitude" else TEXTS, scorer=scorer, cut=secateur.Cut(units=[units]), reading=READING
    )
    assert hasattr(model.config, "head_pruning") == (units == "heads")
    model.save_pretrained(tmp_path / "small")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "small")) == ids(tiny_tokenizer())


def test_what_reads_no_text_needs_no_tokenizer(small, dense, tmp_path):
    shutil.rmtree(dense)
    model, _ = secateur.prune(small, scorer="magnitude", reading=READING)
    model.save_pretrained(tmp_path / "smaller")
    assert not list((tmp_path / "smaller").glob("tokenizer*"))


def test_a_tokenizer_that_was_given_is_saved_and_one_that_lies_there_stays(dense, tmp_path):
    model = load_model(without_tokenizer(dense), "cpu")
    smaller, _ = secateur.prune(model, TEXTS, tokenizer=tiny_tokenizer(), reading=READING)
    smaller.save_pretrained(tmp_path / "small")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "small")) == ids(tiny_tokenizer())
    own = tiny_tokenizer()
    own.add_tokens(["camera"])
    own.save_pretrained(tmp_path / "own")
    smaller.save_pretrained(tmp_path / "own")
    assert "camera" in AutoTokenizer.from_pretrained(tmp_path / "own").get_vocab()
    smaller.save_pretrained(tmp_path / "second", is_main_process=False)
    model.save_pretrained(tmp_path / "whole")  # it was not pruned, and is saved as ever
    for place in ("second", "whole"):
        assert not list((tmp_path / place).glob("tokenizer*"))


def test_steps_name_the_original_too(dense, tmp_path):
    model = load_model(dense, "cpu")
    secateur.remove_(model, secateur.select(secateur.score(model, TEXTS, "contribution")))
    model.save_pretrained(tmp_path / "small")
    assert ids(load_tokenizer(tmp_path / "small")) == ids(tiny_tokenizer())
