"""Distillation: what the loss is, what changes and what does not, and that a failure changes nothing."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from secateur.cli import main
from secateur.comparing.compare import compare
from secateur.comparing.plan import Settings
from secateur.demo import demo_model, demo_task
from secateur.errors import InvalidInputError, SecateurError, UnsupportedModelError
from secateur.models.loading import load_model, load_tokenizer
from secateur.removal.remove import remove_
from secateur.restoring import distillation
from secateur.restoring.distillation import distill_
from secateur.restoring.distillation_loss import share
from secateur.settings import Reading
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.units.masks import Mask
from tests.support.memory import poisoned
from tests.support.tiny import CONFIGS, tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask

TEXTS = tiny_texts(64)
SHORT = Reading(batch_size=16, max_length=16)
QUICK = {"steps": 30, "learning_rate": 2e-3, "reading": SHORT}


def half(model):
    """Return a pruned copy, half of every site's heads gone."""
    smaller = copy.deepcopy(model)
    sites = find_sites(smaller)
    remove_(smaller, Mask({n: torch.arange(s.num_units) < s.num_units // 2 for n, s in sites.items()}))
    return smaller


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, weights):
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_loss_is_a_share_of_the_teachers_variance_over_real_tokens():
    """Wanted 1 and 3 on two real tokens: variance 2 (of a sample). Errors 1 and 3: mean square 5."""
    wanted = torch.tensor([[[1.0], [3.0], [100.0]]])
    found = torch.tensor([[[2.0], [6.0], [-100.0]]])
    assert share(found, wanted, torch.tensor([[1, 1, 0]])) == pytest.approx(5 / 2)
    # A decoder's tokens are not those of the mask.
    assert share(found[:, :2], wanted[:, :2], torch.tensor([[1, 1, 0]])) == pytest.approx(5 / 2)
    assert share(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), None) == 0


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "vit"])
def test_every_kind_comes_nearer_and_keeps_its_embeddings(kind):
    teacher = tiny_model(kind)
    student = half(teacher)
    weights, taught = state(student), state(teacher)
    before, after = distill_(student, teacher, TEXTS, tiny_tokenizer(), **{**QUICK, "steps": 8})
    assert 0 <= after <= before
    assert same(teacher, taught)
    assert same(student, weights) == (after == before)
    table = student.get_input_embeddings().weight
    assert torch.equal(table, next(w for w in weights.values() if w.shape == table.shape))
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in student.parameters())
    recipe = getattr(student.config, "head_pruning", None)  # none where the config says all by its own numbers
    assert recipe is None or recipe.get("distilled", False) is (after < before)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_lowers_the_relational_kl_of_a_tiny_model_by_far(kind):
    teacher = tiny_model(kind)
    before, after = distill_(half(teacher), teacher, TEXTS, tiny_tokenizer(), **QUICK)
    assert after < 0.6 * before


@pytest.mark.real
def test_a_real_model_comes_nearer_on_texts_that_did_not_teach():
    teacher, tokenizer = load_model(demo_model(), "cpu"), load_tokenizer(demo_model())
    texts = demo_task()[0].texts[:180]
    reading = Reading(batch_size=16, max_length=32)
    before, after = distill_(half(teacher), teacher, texts, tokenizer, steps=15, learning_rate=2e-4, reading=reading)
    assert after < 0.9 * before


def test_one_text_of_ten_judges_and_does_not_teach(monkeypatch):
    taught, judged = [], []
    tokens = distillation.tokenize
    monkeypatch.setattr(distillation, "tokenize", lambda *args: taught.extend(args[1]) or tokens(*args))
    calls = PreparedModel.batches
    monkeypatch.setattr(PreparedModel, "batches", lambda *args: judged.extend(args[1]) or calls(*args))
    teacher = tiny_model("bert")
    distill_(half(teacher), teacher, TEXTS, tiny_tokenizer(), **{**QUICK, "steps": 1})
    assert judged == TEXTS[::10]
    assert taught == [text for number, text in enumerate(TEXTS) if number % 10]
    monkeypatch.setattr(distillation, "MOST_HELD_OUT", 4)
    judged.clear()
    distill_(half(teacher), teacher, TEXTS, tiny_tokenizer(), **{**QUICK, "steps": 1})
    assert judged == TEXTS[::16]


def test_the_same_seed_gives_the_same_weights_and_pairs_of_texts_will_do():
    teacher, found = tiny_model("bert"), []
    pairs = [(text, other) for text, other in itertools.pairwise(TEXTS)]
    for seed, around in ((0, torch.enable_grad()), (0, torch.no_grad()), (1, torch.inference_mode())):
        student = half(teacher)
        with around:
            before, after = distill_(
                student, teacher, pairs, tiny_tokenizer(), **{**QUICK, "reading": replace(SHORT, seed=seed)}
            )
        assert after < before
        found.append(state(student))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_a_tasks_head_what_is_frozen_and_modes_stay():
    teacher = BertForSequenceClassification(CONFIGS["bert"]())
    teacher.bert.load_state_dict(tiny_model("bert").state_dict())
    student = half(teacher).train()
    frozen = student.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    head, old, table = student.classifier.weight.clone(), frozen.clone(), student.bert.embeddings.word_embeddings.weight
    teacher.train()
    before, after = distill_(student, teacher, TEXTS, tiny_tokenizer(), **QUICK)
    assert after < before
    assert torch.equal(student.classifier.weight, head)
    assert torch.equal(frozen, old)
    assert not frozen.requires_grad
    assert table.requires_grad
    assert student.training
    assert student.bert.training
    assert teacher.training
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InvalidInputError, match="`model` must have parameters that ask for gradients"):
        distill_(student, teacher, TEXTS, tiny_tokenizer(), **QUICK)


def test_half_precision_weights_are_trained_in_float32_and_come_back_narrow():
    teacher = tiny_model("llama").to(torch.bfloat16)
    student = half(teacher)
    before, after = distill_(student, teacher, TEXTS, tiny_tokenizer(), **QUICK)
    assert after < before
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_where_it_is_no_lower_the_weights_are_what_they_were(monkeypatch):
    teacher = tiny_model("bert")
    student = half(teacher)
    weights, values = state(student), iter([0.25, 0.25])
    monkeypatch.setattr(distillation, "_relational_kl", lambda *_: next(values))
    assert distill_(student, teacher, TEXTS, tiny_tokenizer(), **QUICK) == (0.25, 0.25)
    assert same(student, weights)
    assert "distilled" not in student.config.head_pruning


def test_a_failure_changes_nothing(monkeypatch, outcome):
    teacher, tokenizer = tiny_model("bert"), tiny_tokenizer()
    student = half(teacher)
    weights, padding = state(student), tokenizer.pad_token
    with pytest.raises(SecateurError, match="loss became") as caught:
        distill_(student, teacher, TEXTS, tokenizer, **{**QUICK, "learning_rate": 1e30})
    outcome("NaN and infinity", "distillation at a learning rate of 1e30", caught.value)
    train = distillation.train

    def stopped(*args, **kwargs):
        train(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill_(student, teacher, TEXTS, tokenizer, **QUICK)
    assert same(student, weights)
    assert tokenizer.pad_token == padding
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    student = poisoned(half(teacher))
    with pytest.raises(SecateurError, match=r"first in encoder\.layer\.1\.attention\.self\.query") as caught:
        distill_(student, teacher, TEXTS, tokenizer, **QUICK)
    outcome("NaN and infinity", "the second layer computes nan, distillation", caught.value)


def test_what_cannot_be_distilled_is_refused():
    teacher, tokenizer = tiny_model("bert"), tiny_tokenizer()
    student = half(teacher)
    with pytest.raises(InvalidInputError, match=r"`texts` must be at least 21, .* got 20"):
        distill_(student, teacher, TEXTS[:20], tokenizer)
    with pytest.raises(InvalidInputError, match=r"`teacher` must be another model .* got 'BertModel'"):
        distill_(student, student, TEXTS, tokenizer)
    wide = BertModel(BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4))
    with pytest.raises(InvalidInputError, match=r"got hidden states 64 wide where the pruned model has 32$"):
        distill_(student, wide, TEXTS, tokenizer)
    with torch.inference_mode():
        unreachable = copy.deepcopy(teacher)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        distill_(unreachable, teacher, TEXTS, tokenizer)
    with pytest.raises(InvalidInputError, match=r"`teacher` must be another model .* got 'Linear'"):
        distill_(student, torch.nn.Linear(2, 2), TEXTS, tokenizer)


def test_the_command_teaches_a_pruned_folder(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    (tmp_path / "texts.csv").write_text("sentence\n" + "".join(f"{text}\n" for text in TEXTS))
    data = ["--data", str(tmp_path / "texts.csv"), "--device", "cpu", "--out", str(tmp_path / "small")]
    assert main(["prune", str(tmp_path / "whole"), *data, "--scorer", "contribution", "--restore", "none"]) == 0
    capsys.readouterr()
    words = ["distill", tmp_path / "small", "--data", tmp_path / "texts.csv", "--device", "cpu", "--steps", 30]
    words = [*map(str, words), "--learning-rate", "2e-3", "--max-length", "16"]
    assert main([*words, "--out", str(tmp_path / "better"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"] == str(tmp_path / "whole")
    assert told["relational_kl"][1] < told["relational_kl"][0]
    assert {**json.loads((tmp_path / "better" / "distillation.json").read_text()), "out": told["out"]} == told
    for name in ("pruning_report.json", "attention_maps.json"):
        assert (tmp_path / "better" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert "Distilled after the proof, in 30 steps" in (tmp_path / "better" / "report.html").read_text()
    assert main(["verify", str(tmp_path / "better")]) == 0
    assert "and was distilled since" in capsys.readouterr().out
    assert main([*words, "--texts", "20", "--out", str(tmp_path / "other")]) == 2
    assert "error: `texts` must be at least 21" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    report = tmp_path / "small" / "pruning_report.json"
    whole_report = report.read_text()
    report.write_text("{}")
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "pruning_report.json has another form" in capsys.readouterr().err
    report.write_text(whole_report)
    words[1] = str(tmp_path / "whole")
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "is not pruned" in capsys.readouterr().err
    words[1] = str(tmp_path / "small")
    assert main([*words, "--against", str(tmp_path / "small"), "--out", str(tmp_path / "third")]) == 0
    assert "no lower after 30 steps, so without" in capsys.readouterr().out
    third, small = (load_model(tmp_path / name).state_dict() for name in ("third", "small"))
    assert all(torch.equal(third[name], weight) for name, weight in small.items())


def test_a_comparison_distils_pruned_runs_on_all_texts_and_leaves_dense_ones(tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(
        "secateur.comparing.run.distill_",
        lambda *args, **kwargs: taught.append(args[2]) or distill_(*args, **kwargs),
    )
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "task").mkdir()
    for split, count in (("train", 40), ("dev", 10)):
        rows = "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(TEXTS[:count]))
        (tmp_path / "task" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    found = {}
    for restore in ("none", "distill"):
        settings = Settings(
            str(tmp_path / "model"), (str(tmp_path / "task"),), ("contribution",), seeds=1, num_texts=8, epochs=1.0,
            max_train=24, restore=restore, steps=3,
        )  # fmt: skip
        rows = compare(settings, tmp_path / restore, device="cpu", progress=False)
        found[restore] = {row["scorer"]: row for row in rows}
    assert "distillation" not in found["distill"]["dense"]
    assert "distillation" not in found["none"]["contribution"]
    assert found["distill"]["dense"]["train_loss"] == found["none"]["dense"]["train_loss"]
    assert len(found["distill"]["contribution"]["distillation"]) == 2
    assert found["distill"]["contribution"]["cost"]["distillation_seconds"] > 0
    assert taught == [TEXTS[:40]]  # of which 24 are for fine-tuning
    with pytest.raises(InvalidInputError, match="`steps` must be a whole number from 1"):
        Settings("m", ("d",), ("contribution",), steps=0)


def test_a_folder_whose_config_says_all_is_taught_by_the_model_that_is_named(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    model = tiny_model("bert")
    for name in ("whole", "small"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if name == "whole":
            remove_(model, even_mask(find_units(model, ["neurons"])))
    (tmp_path / "texts.csv").write_text("sentence\n" + "".join(f"{text}\n" for text in TEXTS))
    words = ["distill", tmp_path / "small", "--data", tmp_path / "texts.csv", "--device", "cpu", "--steps", 30]
    words = [*map(str, words), "--learning-rate", "2e-3", "--max-length", "16", "--out", str(tmp_path / "taught")]
    assert main(words) == 2
    assert "does not say what it was pruned from; give the original with" in capsys.readouterr().err
    assert main([*words, "--against", str(tmp_path / "whole")]) == 0
    before, after = json.loads((tmp_path / "taught" / "distillation.json").read_text())["relational_kl"]
    assert after < before
