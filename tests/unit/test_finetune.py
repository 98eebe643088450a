"""Evaluation and fine-tuning of tiny models on toy texts."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from secateur.errors import InvalidInputError, SecateurError
from secateur.finetuning.evaluate import (
    check_model_fits,
    evaluate_model,
)
from secateur.finetuning.finetune import FinetuneResult, finetune, load_classifier
from secateur.settings import Reading
from secateur.texts.data import Task

FILLERS = [f"w{i}" for i in range(20)]
WORDS = ["good", "bad", *FILLERS]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and threads that wait for each other on a busy machine cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokenizer(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(vocabulary), model_max_length=16)


@pytest.fixture
def transformers_warnings():
    """Let transformers warn as it does for users, whatever the test run is set to."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(verbosity)


def decoder_tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", *WORDS])}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", model_max_length=16)


def bert_config(**changes):
    return BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        **changes,
    )


def tiny_bert(seed=0, **changes):
    torch.manual_seed(seed)
    return BertForSequenceClassification(bert_config(**changes))


def toy_task(n, seed, name="toy", pairs=False):
    """Texts of random words and random lengths; the one word `good` or `bad` somewhere among them is the label."""
    draw = random.Random(seed)
    texts, labels = [], []
    for i in range(n):
        words = draw.choices(FILLERS, k=draw.randint(2, 8))
        words.insert(draw.randint(0, len(words)), ["bad", "good"][i % 2])
        texts.append((words[0], " ".join(words[1:])) if pairs else " ".join(words))
        labels.append(i % 2)
    return Task(name, texts, labels)


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a pre-trained encoder, that is, one without a classification head."""
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- evaluation ------------------------------------------------------------------------------------------------------


class SaysGood(torch.nn.Module):
    """A classifier that is always right on the toy task: class 1 where the token `good` (5) is in the text."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dropout = torch.nn.Dropout(0.5)
        self.config = SimpleNamespace(num_labels=2, pad_token_id=0)
        self.device = torch.device("cpu")
        self.modes = set()

    def forward(self, input_ids, **inputs):
        self.modes.add((self.training, self.dropout.training, torch.is_grad_enabled()))
        good = (input_ids == 5).any(dim=1).float()
        return SimpleNamespace(logits=torch.stack([1 - good, good], dim=1))


@pytest.mark.parametrize("pairs", [False, True])
def test_predictions_stay_with_their_labels(tokenizer, pairs, capfd):
    model = SaysGood()
    task = toy_task(30, seed=0, pairs=pairs)
    kwargs = {"reading": Reading(batch_size=4)}
    assert evaluate_model(model, tokenizer, task, **kwargs) == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
    wrong = Task("toy", task.texts, [1 - task.labels[0], *task.labels[1:]])
    assert evaluate_model(model, tokenizer, wrong, **kwargs)["accuracy"] == pytest.approx(29 / 30)
    assert capfd.readouterr() == ("", "")


def test_evaluation_leaves_the_model_as_it_was(tokenizer, capfd):
    model = SaysGood().train()
    model.dropout.eval()
    evaluate_model(model, tokenizer, toy_task(4, seed=0))
    assert model.modes == {(False, False, False)}
    assert model.training
    assert not model.dropout.training
    assert capfd.readouterr().out == ""


def test_evaluation_of_a_decoder_without_padding_token():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1 + len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model, tokenizer = GPT2ForSequenceClassification(config).eval(), decoder_tokenizer()
    # Alone or padded to the length of another text: the decoder classifies at the last real token.
    texts = toy_task(20, seed=0).texts
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in texts]
    assert set(alone) == {0, 1}
    task = Task("toy", texts, alone)
    assert evaluate_model(model, tokenizer, task, reading=Reading(progress=False))["accuracy"] == 1.0
    assert model.config.pad_token_id is None
    assert tokenizer.pad_token is None


def test_evaluation_refuses_models_that_do_not_fit(tokenizer):
    three, real = Task("t", ["a", "b"], [0, 2]), Task("t", ["a", "b"], [0.5, 2.0])
    two, one = tiny_bert(), tiny_bert(num_labels=1)
    with pytest.raises(
        InvalidInputError, match=r"have 3 outputs or more, one for each class to fit 't'.*num_labels = 2"
    ):
        evaluate_model(two, tokenizer, three)
    with pytest.raises(InvalidInputError, match="have 1 output for a regression to fit 't', got 'num_labels = 2'"):
        evaluate_model(two, tokenizer, real)
    with pytest.raises(InvalidInputError, match="num_labels = 1"):
        evaluate_model(one, tokenizer, toy_task(2, seed=0))
    with pytest.raises(InvalidInputError, match="`task` must have labels"):
        evaluate_model(two, tokenizer, Task("t", ["a"]))
    check_model_fits(tiny_bert(num_labels=3), toy_task(2, seed=0))
    with pytest.raises(InvalidInputError, match="`model` must be a sequence-classification model, got 'BertModel'"):
        evaluate_model(BertModel(bert_config()), tokenizer, toy_task(2, seed=0), reading=Reading(progress=False))


# --- fine-tuning -----------------------------------------------------------------------------------------------------

ON_CPU = Reading(batch_size=8, device="cpu")
FAST = {"epochs": 1, "reading": ON_CPU}


def test_a_tiny_model_learns_which_word_matters(base, tmp_path, tokenizer, transformers_warnings, capfd, caplog):
    train, dev = toy_task(256, seed=1), toy_task(100, seed=2)
    untrained = evaluate_model(tiny_bert(), tokenizer, dev, reading=Reading(progress=False))
    assert untrained["accuracy"] < 0.7
    before = sorted(tmp_path.iterdir())
    model, result = finetune(
        base,
        train,
        dev,
        out=tmp_path / "out",
        epochs=8,
        learning_rate=5e-3,
        reading=Reading(batch_size=16, device="cpu", progress=True),
    )
    assert logging.get_verbosity() == logging.WARNING
    assert result.metrics["accuracy"] > 0.9
    assert result.main_metric == "accuracy"
    assert result.steps == 8 * 16
    assert 0 < result.train_loss < math.log(2)
    assert result.seconds > 0
    assert not model.training
    # The folder is an ordinary one, and says what was done.
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert not list((tmp_path / "out").glob("checkpoint*"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.problem_type == "single_label_classification"
    assert again.config.use_cache == tiny_bert().config.use_cache
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert evaluate_model(again, reloaded, dev, reading=Reading(progress=False)) == result.metrics
    written = json.loads((tmp_path / "out" / "finetune_result.json").read_text())
    settings = written.pop("settings")
    assert FinetuneResult(**written) == result
    assert settings["seed"] == 0
    assert settings["model"] == str(base)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fine-tune on toy" in captured.err
    # The log, because transformers took hold of stderr before this test's capture began.
    assert "LOAD REPORT" not in caplog.text


def test_the_seed_fixes_everything_and_nothing_is_printed(base, capfd):
    task = toy_task(32, seed=1)
    states = [finetune(base, task, epochs=1, reading=replace(ON_CPU, seed=seed))[0].state_dict() for seed in (3, 3, 4)]
    equal = [all(torch.equal(states[0][name], other[name]) for name in states[0]) for other in states[1:]]
    assert equal == [True, False]
    assert capfd.readouterr() == ("", "")


def test_bfloat16_changes_the_training_and_not_what_comes_back(tokenizer):
    train, dev = toy_task(64, seed=1), toy_task(20, seed=2)
    losses = []
    for bf16 in (False, True, True):
        torch.manual_seed(0)
        model, result = finetune(
            tiny_bert(), train, dev, tokenizer=tokenizer, epochs=1, reading=replace(ON_CPU, bf16=bf16)
        )
        losses.append(result.train_loss)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not {"forward", "_original_forward"} & set(vars(model))  # no autocast stays behind
        logits = model(**tokenizer("good", return_tensors="pt")).logits
        assert logits.bfloat16().float().ne(logits).any()
    finetune(tiny_bert(), train, tokenizer=tokenizer, epochs=1, reading=replace(ON_CPU, bf16=True, device=None))
    assert losses[0] != losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_loaded_model_is_trained_in_place(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() | {"problem_type": "single_label_classification"}
    same, result = finetune(model, toy_task(20, seed=0, pairs=True), tokenizer=tokenizer, **FAST)
    assert same is model
    assert result.metrics == {}
    assert result.steps == 3
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not list(tmp_path.iterdir())


def test_regression_learns(base):
    def stars(n, seed):
        task = toy_task(n, seed, name="stars")
        return Task("stars", task.texts, [4.5 if label else 0.5 for label in task.labels])

    settings = {"epochs": 8, "learning_rate": 5e-3, "reading": replace(ON_CPU, batch_size=16)}
    model, result = finetune(base, stars(160, 1), stars(60, 2), **settings)
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1
    assert result.main_metric == "spearman"
    assert result.metrics["pearson"] > 0.8


def test_a_new_regression_head_starts_at_the_mean_label_and_a_trained_one_is_kept(base, tmp_path):
    stars = Task("stars", ["good"] * 4, [1.0, 2.0, 3.0, 6.0])
    model = load_classifier(base, stars)
    assert model.classifier.bias.tolist() == [3.0]
    assert load_classifier(base, Task("t", ["good"] * 2, [0, 1])).classifier.bias.tolist() == [0.0, 0.0]
    torch.nn.init.constant_(model.classifier.bias, 0.5)
    model.save_pretrained(tmp_path / "tuned")
    assert load_classifier(tmp_path / "tuned", stars).classifier.bias.tolist() == [0.5]


def test_a_decoder_without_padding_token(tmp_path):
    config = GPT2Config(
        vocab_size=1 + len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer = decoder_tokenizer()
    model, _ = finetune(tmp_path / "gpt2", toy_task(16, 0), tokenizer=tokenizer, out=tmp_path / "out", **FAST)
    assert tokenizer.pad_token is None
    assert model.config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<end>"


def test_an_empty_text_of_which_the_tokenizer_makes_nothing():
    config = GPT2Config(
        vocab_size=1 + len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    task, tokenizer = Task("t", ["", "good", "", "bad"], [0, 1, 0, 1]), decoder_tokenizer()
    model, result = finetune(
        GPT2ForSequenceClassification(config),
        task,
        tokenizer=tokenizer,
        epochs=1,
        reading=replace(ON_CPU, batch_size=1),
    )
    assert result.steps == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_head_has_room_for_the_classes_of_both_splits(base):
    train, dev = Task("t", ["good"] * 8, [0, 1] * 4), Task("t", ["bad"] * 3, [0, 1, 2])
    model, result = finetune(base, train, dev, **FAST)
    assert model.config.num_labels == 3
    assert set(result.metrics) == {"accuracy", "f1_macro"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Task("t", ["a"])}, "`task` must have labels, got 't'"),
        ({"dev": Task("d", ["a"])}, "`task` must have labels, got 'd'"),
        ({"dev": Task("d", ["a"], [0.5])}, "`dev` must be a regression or a classification as the training task is"),
        ({"epochs": 0}, "`epochs` must be a number above 0, got 0"),
        ({"learning_rate": -1.0}, r"`learning_rate` must be a number above 0, got -1\.0"),
        ({"reading": 8}, r"`reading` must be a Reading, such as secateur.Reading\(\), got 8"),
        ({"reading": Reading(device="cpu:1")}, "`device` must name no other device than the first"),
        ({"tokenizer": None}, "`tokenizer` must be given with a loaded model, got None"),
        ({"model_or_path": "./missing"}, r"`model` must be a folder that exists, or a Hub id, got '\./missing'"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(tokenizer, changes, message, monkeypatch):
    monkeypatch.setattr("secateur.finetuning.trainer.ResumedTrainer", None)
    arguments = {"model_or_path": tiny_bert(), "task": toy_task(4, 0), "tokenizer": tokenizer} | changes
    with pytest.raises(InvalidInputError, match=message):
        finetune(**arguments)


def test_a_used_folder_is_refused_before_the_training(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.finetuning.trainer.ResumedTrainer", None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="`out` must be a new or empty folder"):
        finetune(tiny_bert(), toy_task(4, 0), tokenizer=tokenizer, out=tmp_path)


def test_models_that_do_not_load_or_fit(base, tmp_path, tokenizer):
    tiny_bert(num_labels=2).save_pretrained(tmp_path / "two")
    three = Task("t", ["a", "b", "a"], [0, 1, 2])
    with pytest.raises(
        InvalidInputError, match="do not fit a model with 3 outputs; where it is fine-tuned for another"
    ):
        finetune(tmp_path / "two", three, tokenizer=tokenizer, **FAST)
    with pytest.raises(InvalidInputError, match="have 3 outputs or more"):
        finetune(tiny_bert(), three, tokenizer=tokenizer, **FAST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InvalidInputError, match=r"`model` must be a folder with a config.json, or a Hub id, got '.*empty'"
    ):
        finetune(tmp_path / "empty", three, **FAST)
    if not torch.cuda.is_available():
        with pytest.raises(
            InvalidInputError, match="`device` must be a device that this machine has, such as 'cpu', got 'cuda'"
        ):
            finetune(base, three, epochs=1, reading=replace(ON_CPU, device="cuda"))


def test_a_loss_that_explodes_is_an_error(base, tmp_path):
    task = Task("t", ["good", "bad"] * 8, [3e38, -3e38] * 8)
    with pytest.raises(SecateurError, match=r"the training loss became .*; try a lower `learning_rate`"):
        finetune(base, task, out=tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()
