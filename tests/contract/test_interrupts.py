"""Ctrl-C in the code that changes a model and puts it back: the model is what it was, or the work is done whole."""

import contextlib
import signal
import sys

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.utils import logging

import secateur
from secateur.models.failure import running_modules
from secateur.models.loading import quiet_transformers
from secateur.models.state import (
    bfloat16_passes,
    evaluation_mode,
    frozen,
    gradients_for_all,
    gradients_kept,
    held,
    in_float32,
)
from secateur.sites.gating import probe
from secateur.support.interrupts import undoing
from tests.support.scoring import condition
from tests.support.tiny import tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS, TOKENIZER, READING = tiny_texts(6), tiny_tokenizer(), secateur.Reading(batch_size=6, max_length=4)
SITE = "encoder.layer.0.attention.self"
GATES = {SITE: torch.ones(2), "encoder.layer.0.output.dense": torch.ones(4)}
MASK = secateur.Mask({SITE: torch.tensor([True, False])})
CHECKED = (contextlib.__file__, torch.autograd.grad_mode.__file__, torch.overrides.__file__)


def model_in_bfloat16():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, vocab_size=16)
    model = BertModel(config).to(torch.bfloat16).train()
    next(model.parameters()).requires_grad_(False)
    return model


def score(model):
    secateur.score(model, TEXTS, "contribution", TOKENIZER, reading=READING)


def reconstruct(model):
    secateur.reconstruct_(model, MASK, TEXTS, TOKENIZER, reading=READING)


def remove(model):
    secateur.remove_(model, MASK)


def prune(model):
    secateur.prune(model, TEXTS, 0.5, scorer="magnitude", tokenizer=TOKENIZER, reading=READING)


def state_of(model):
    """All that a call may not leave half done."""
    weights = {name: (t.dtype, t.float().numpy().tobytes()) for name, t in model.state_dict().items()}
    own, rest = {k: v for k, v in vars(model).items() if k.startswith("_secateur")}, condition(model.float())
    model.to(torch.bfloat16)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return weights, own, rest[1:], modes, len(torch.overrides._get_current_function_mode_stack())


class Interrupt:
    """Sends one signal where Python would hear it: as a function begins, or as one that is written in C returns.

    Only where a context is entered or left, in our code or in what it calls of Python's and torch's.
    """

    def __init__(self, at=None):
        self.at, self.passed = at, 0

    def __call__(self, frame, event, _):
        if event not in ("call", "c_return") or not _is_watched(frame):
            return
        if self.passed == self.at:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)
        self.passed += 1

    def run(self, call, model):
        sys.setprofile(self)
        try:
            call(model)
        finally:
            sys.setprofile(None)


def _is_watched(frame):
    code = frame.f_code
    if code.co_name == "<genexpr>" or not ("/secateur/" in code.co_filename or code.co_filename in CHECKED):
        return False  # what a generator that is dropped raises, Python itself ignores
    while frame is not None and frame.f_code.co_name not in ("__enter__", "__exit__", "in_one_go"):
        frame = frame.f_back
    return frame is not None


def all_contexts(model):
    base = model.base_model
    with (
        held(base), evaluation_mode(base), in_float32(base), gradients_kept(base), gradients_for_all(base),
        bfloat16_passes(base), frozen(base), probe(base, lambda reading: None, gates=GATES),
        running_modules(base), quiet_transformers(progress=False), torch.no_grad(),
    ):  # fmt: skip
        pass


@pytest.fixture
def heard():
    """A process that was started in the background ignores Ctrl-C, and so does every test in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(
    ("call", "moments"),
    [
        (all_contexts, range(0, 840, 15)),
        (score, range(0, 2100, 350)),
        (reconstruct, range(70, 3700, 900)),
        (remove, (400, 4500, -60)),
        (prune, (500,)),
    ],
)
def test_ctrl_c_leaves_a_model_as_it_was_or_the_work_done(call, moments):
    """A model that is half changed is neither what it was before nor what the call makes of it."""
    model, whole = model_in_bfloat16(), Interrupt()
    before, verbosity = state_of(model), logging.get_verbosity()
    if call is all_contexts:
        call(model)  # knows then where its heads are
    if call is not prune:  # which changes a copy
        whole.run(call, model)
    outcomes = [before, state_of(model)]
    for moment in moments:
        model = model if call is all_contexts else model_in_bfloat16()
        with pytest.raises(KeyboardInterrupt):
            Interrupt(moment if moment >= 0 else whole.passed + moment).run(call, model)
        assert state_of(model) in outcomes
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, True)
        all_contexts(model)  # nobody holds it


def test_a_handler_of_the_callers_own_hears_ctrl_c_once_the_context_is_entered():
    heard, model = [], model_in_bfloat16()

    @undoing
    def changing():
        signal.raise_signal(signal.SIGINT)
        heard.append("entered")
        yield

    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with held(model), changing():
            assert heard == ["entered"]
            while len(heard) < 2:
                pass
        mine = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == ["entered", signal.SIGINT]
    assert mine is not before
    assert mine.__name__ == "<lambda>"
