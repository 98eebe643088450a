"""The battery of promises on the tiny kinds, and that each of its checks can fail."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from benchmarks import battery, sweep

from secateur.errors import RemovalError
from secateur.sites import gating
from tests.support.tiny import tiny_model

# Through the interface and past it, encoders, decoders and both, grouped queries, windows, pictures: the sweep has all.
KINDS = ["vit", "modernbert", "llama", "t5", "falcon"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_every_promise_is_kept(kind):
    assert battery.failures(tiny_model(kind)) == {}


def check(name, model):
    with pytest.raises(battery.Failed) as caught:
        battery.CHECKS[name](model)
    return str(caught.value)


def test_gates_that_move_long_texts_alone_are_noticed(monkeypatch):
    honest = gating._pass

    def crooked(entry, reading):
        outputs = honest(entry, reading)
        return outputs * 1.1 if entry.gates and outputs.shape[1] > 90 else outputs

    monkeypatch.setattr(gating, "_pass", crooked)
    name = "gates of ones are the identity"
    assert "input_ids [1, 100]" in check(name, tiny_model("llama"))  # the config has a number 99
    battery.CHECKS[name](tiny_model("vit"))


def test_steps_that_differ_from_the_whole_text_are_noticed(monkeypatch):
    def crooked(model, mask):
        attention = model.layers[0].self_attn
        run = attention.forward

        def forward(*args, **kwargs):
            outputs, *rest = run(*args, **kwargs)
            return (outputs * 1.5 if outputs.shape[1] == 1 else outputs), *rest

        attention.forward = forward

    monkeypatch.setattr(battery, "remove_", crooked)
    assert "token by token" in check("cached steps are the whole text", tiny_model("llama"))


def test_neurons_and_layers_that_are_not_as_if_gated_are_noticed(monkeypatch):
    monkeypatch.setattr(battery, "remove_", lambda model, mask: first(model).data.mul_(2))
    assert "than with them gated" in check("removed neurons and layers are gated ones", tiny_model("bert"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda model: model.eval(), "ends training mode"),
        (lambda model: [p.data.add_(1) for p in model.parameters() if model.training], "has another embeddings"),
        (lambda model: model.train(), "ends evaluation mode"),
    ],
)
def test_what_depends_on_the_mode_is_noticed(spoil, says, monkeypatch):
    def crooked(model, **settings):
        smaller = copy.deepcopy(model)
        spoil(smaller)
        return smaller, SimpleNamespace(mask=None)

    monkeypatch.setattr(battery, "prune", crooked)
    assert says in check("training mode changes nothing", tiny_model("bert"))


def test_a_refusal_in_training_mode_alone_is_noticed(monkeypatch):
    def crooked(model, **settings):
        if model.training:
            raise RemovalError("no")
        return copy.deepcopy(model), SimpleNamespace(mask=None)

    monkeypatch.setattr(battery, "prune", crooked)
    assert "is refused: no" in check("training mode changes nothing", tiny_model("bert"))


def first(model):
    return next(model.parameters())


@pytest.mark.parametrize(
    ("leave", "says"),
    [
        (lambda model: first(model).data.mul_(2), "changes the values of embeddings.word"),
        (lambda model: setattr(first(model), "grad", None), "changes `.grad` of embeddings.word"),
        (lambda model: first(model).requires_grad_(False), "changes `requires_grad` of embeddings.word"),
        (lambda model: model.embeddings.position_ids.add_(1), "changes the buffer embeddings.position_ids"),
        (lambda model: model.encoder.eval(), "changes the mode of encoder"),
        (lambda model: model.encoder.register_forward_hook(print), "changes the hooks of encoder"),
        (lambda model: setattr(model.encoder, "left", 1), "changes attributes of encoder"),
        (lambda model: setattr(model.config, "hidden_size", 1), "changes the config of BertModel"),
        (lambda model: setattr(model, "pooler", None), "takes away"),
        (lambda model: torch.rand(1), "changes torch's random state"),
        (lambda model: random.random(), "changes Python's random state"),
        (lambda model: battery.numpy.random.rand(), "changes NumPy's random state"),
    ],
)
def test_what_is_left_behind_is_noticed(leave, says):
    with pytest.raises(battery.Failed, match=says):
        battery.borrowing(leave)(tiny_model("bert"))


def test_a_verdict_of_verify_and_unexpected_errors_are_failures(monkeypatch):
    monkeypatch.setattr(battery, "verify_checkpoint", lambda *_: {"equal": False, "max_difference": 1.0})
    name = "pruning a copy leaves the model alone, and `verify` agrees"
    monkeypatch.setattr(battery, "CHECKS", {name: battery._prune_and_verify, "broken": lambda model: 1 // 0})
    found = battery.failures(tiny_model("bert"))
    assert "finds a difference of 1" in found[name]
    assert found["broken"].startswith("ZeroDivisionError")


def test_the_sweep_has_a_column_for_it_and_its_page_a_count(monkeypatch):
    monkeypatch.setattr(sweep, "check_type", lambda kind: {"outcome": "captured", **({"whole": True} if kind else {})})
    monkeypatch.setattr(sweep, "check_promises", lambda kind: {"outcome": "tried", "failed_checks": {"a": "b"}})
    failed, without = sweep.row_of("bert", 20), sweep.row_of("", 20)
    assert failed["failed_checks"] == {"a": "b"}
    assert "failed_checks" not in without
    monkeypatch.setattr(sweep, "check_promises", lambda kind: {}[kind])
    dead = sweep.row_of("bert", 20)
    assert "without an answer" in dead["failed_checks"]["the battery"]
    facts = {"command": "", "date": "", "machine": "", "versions": {"transformers": "", "torch": ""}}
    page = sweep.page({**facts, "types": [failed, without, dead, {**failed, "failed_checks": {}}]})
    assert "kept, of 3 with sites | 1 |" in page
