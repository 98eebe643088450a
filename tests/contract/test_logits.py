"""A task's head, where it has learned, teaches the pruned model and judges it."""

import copy
import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import secateur
from secateur.errors import SecateurWarning
from secateur.finetuning.finetune import finetune
from secateur.models.loading import load_model
from secateur.models.state import evaluation_mode
from secateur.removal.remove import remove_
from secateur.report.reading import _quality
from secateur.restoring import logits as of_heads
from secateur.restoring.distillation import distill_
from secateur.restoring.distillation_loss import Pair, taught_by_logits
from secateur.restoring.logits import learned_logits, logits_loss
from secateur.restoring.quality import QualityJudge
from secateur.settings import Reading
from secateur.sites.finding import find_units
from secateur.texts.calibration import PreparedModel
from secateur.texts.data import Task
from tests.support.tiny import CONFIGS, _stirred, tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask

TEXTS = tiny_texts(60)
READING = Reading(batch_size=8, max_length=16, device="cpu")
TASKS = {
    "texts": ("bert", AutoModelForSequenceClassification),
    "tokens": ("bert", AutoModelForTokenClassification),
    "next tokens": ("llama", AutoModelForCausalLM),
}


def task_model(name, seed=0):
    kind, auto = TASKS[name]
    torch.manual_seed(seed)
    return _stirred(auto.from_config(CONFIGS[kind]())).eval()


def batch_of(model, count=8):
    return PreparedModel(model, tiny_tokenizer(), READING).batch(TEXTS[:count])


def test_the_loss_of_classes_is_the_divergence_at_temperature_two_by_hand():
    """Wanted 2 ln 3 and 0, at temperature 2 that is 3/4 and 1/4; found 0 and 0, a half each."""
    found, wanted = torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]])
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert logits_loss(found, wanted, True).item() == pytest.approx(by_hand, abs=1e-6)
    assert logits_loss(torch.cat([found, wanted]), torch.cat([wanted, wanted]), True).item() == pytest.approx(
        by_hand / 2, abs=1e-6
    )
    assert logits_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]]), False).item() == 2.5


@pytest.mark.parametrize("name", TASKS)
def test_logits_count_beside_hidden_states(name, monkeypatch):
    student, teacher = task_model(name, 0), task_model(name, 1)
    batch = batch_of(student)
    assert taught_by_logits(student, teacher, batch)
    with torch.no_grad():
        own, answers = (model(**batch).logits for model in (student, teacher))
        if name != "texts":
            own, answers = (logits[batch["attention_mask"].bool()] for logits in (own, answers))
        both, states = (Pair(student, teacher, {}, by_logits)(**batch)["loss"] for by_logits in (True, False))
        assert (both - states).item() == pytest.approx(logits_loss(own, answers, True).item(), rel=1e-4)
        monkeypatch.setattr(of_heads, "MOST_TOKENS", 16)  # the first and the last of each text
        few = learned_logits(teacher, batch)
        mask = batch["attention_mask"][:, [0, -1]].bool()
        wanted = teacher(**batch).logits if name == "texts" else teacher(**batch).logits[:, [0, -1]][mask]
    assert torch.allclose(few, wanted, atol=1e-5)


def test_a_head_that_was_drawn_at_random_says_nothing(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "base")
    task_model("texts").save_pretrained(tmp_path / "tuned")
    new = load_model(tmp_path / "base", "cpu", AutoModelForSequenceClassification)
    tuned = load_model(tmp_path / "tuned", "cpu")
    batch = batch_of(new)
    assert learned_logits(new, batch) is None
    assert learned_logits(copy.deepcopy(new), batch) is None
    assert not taught_by_logits(new, copy.deepcopy(new), batch)
    assert not taught_by_logits(new, tuned, batch)
    assert taught_by_logits(copy.deepcopy(tuned), tuned, batch)
    finetune(new, Task("t", TEXTS[:8], [0, 1] * 4), tokenizer=tiny_tokenizer(), epochs=1, reading=Reading(device="cpu"))
    assert learned_logits(new, batch).shape == (8, 2)


def test_models_without_logits_of_their_texts_are_taught_by_hidden_states():
    base = tiny_model("bert")
    assert learned_logits(base, batch_of(base)) is None
    torch.manual_seed(0)
    chooser = AutoModelForMultipleChoice.from_config(CONFIGS["bert"]())
    assert learned_logits(chooser, batch_of(chooser)) is None
    classifier = task_model("texts")
    three = tiny_classifier("bert", num_labels=3)
    assert not taught_by_logits(classifier, three, batch_of(classifier))
    assert not taught_by_logits(classifier, classifier.bert, batch_of(classifier))


def learned(model):
    """Let a head find each of its classes likeliest for some texts, as a trained one does."""
    model.eval().classifier.weight.data.mul_(5)
    with torch.no_grad():
        model.classifier.bias.sub_(model(**batch_of(model, 60)).logits.mean(dim=0))
    return model


def judged(model, change=lambda model: None):
    judge = QualityJudge(PreparedModel(model, tiny_tokenizer(), READING), TEXTS, READING)
    change(model)
    return judge()


def test_agreement_is_the_share_of_equal_answers():
    model, dense = learned(tiny_classifier("bert")), tiny_classifier("bert")
    batch = batch_of(model, 60)

    def answers():
        with evaluation_mode(model), torch.no_grad():
            return model(**batch).logits.argmax(dim=1)

    before = answers()
    quality = judged(model, lambda model: model.bert.encoder.layer[1].output.dense.weight.data.mul_(-3))
    wanted = float((before == answers()).float().mean())
    assert 0 < wanted < 1
    assert quality.agreement == pytest.approx(wanted)
    assert str(quality).startswith(f"answers as the dense model {wanted:.1%}, mean cosine")
    assert {row["name"]: row["pruned"] for row in _quality(quality.to_json())}["answers as the dense model"] == wanted
    assert judged(dense).agreement == 1
    assert judged(task_model("next tokens")).agreement == 1
    none = judged(tiny_classifier("bert", num_labels=1))
    assert none.agreement is None
    assert [row["name"] for row in _quality(none.to_json())] == ["mean cosine to the dense model", "relational KL"]
    assert judged(tiny_model("bert")).agreement is None


def test_a_classifier_answers_more_like_the_dense_one_where_its_head_teaches(monkeypatch):
    teacher, losses = learned(tiny_classifier("bert")), {}
    batch = batch_of(teacher, 60)
    given = {"steps": 30, "learning_rate": 2e-3, "reading": READING}
    for by_logits in (True, False):
        if not by_logits:
            monkeypatch.setattr("secateur.restoring.distillation.taught_by_logits", lambda *_: False)
        student = copy.deepcopy(teacher)
        remove_(student, even_mask(find_units(student, ["heads", "neurons"])))
        head = student.classifier.weight.clone()
        before, after = distill_(student, teacher, TEXTS, tiny_tokenizer(), **given)
        assert after < before
        assert torch.equal(student.classifier.weight, head)
        assert student.classifier.weight.requires_grad
        losses[by_logits] = logits_loss(learned_logits(student, batch), learned_logits(teacher, batch), True).item()
    assert losses[True] < 0.8 * losses[False]


def test_a_folder_is_pruned_with_its_task_and_judged_by_it(tmp_path):
    tiny_classifier("bert").save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    tiny_model("bert").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))  # names a classifier, of which there is no head
    given = {"restore": "distill", "steps": 1, "reading": READING}
    smaller, report = secateur.prune(tmp_path / "tuned", TEXTS, 0.25, **given)
    assert type(smaller).__name__ == "BertForSequenceClassification"
    assert 0 < report.to_json()["quality"]["agreement"] <= 1
    with pytest.warns(SecateurWarning, match="are random here"):
        assert secateur.prune(tmp_path / "base", TEXTS, 0.25, **given)[1].quality.agreement is None
