"""Ctrl-C in the code that changes a model and puts it back: the model is what it was, or the work is done whole.

The suite tries a fixed part of the moments at which a context is entered or left. `make fuzz` tries all of those of the
contexts themselves, and a thousand of each call, others each time.
"""

import contextlib
import copy
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging

import secateur
from secateur.errors import UnsupportedModelError
from secateur.exporting.onnx import one_error
from secateur.finetuning.evaluate import evaluate_model
from secateur.finetuning.finetune import finetune
from secateur.measuring.bench import Shape, benchmark
from secateur.measuring.cost import measure_cost
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
from secateur.texts.data import Task
from tests.contract.test_fuzz import CASES, FULL
from tests.support.scoring import condition
from tests.support.tiny import tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SECTION = "Kills, Ctrl-C and disks"
TEXTS, TOKENIZER, READING = tiny_texts(6), tiny_tokenizer(), secateur.Reading(batch_size=6, max_length=4)
SITE = "encoder.layer.0.attention.self"
GATES = {SITE: torch.ones(2), "encoder.layer.0.output.dense": torch.ones(4)}
MASK = secateur.Mask({SITE: torch.tensor([True, False])})
MORE_TEXTS = tiny_texts(21)
TASK = Task("tiny", TEXTS, [0, 1] * 3)
CHECKED = (contextlib.__file__, torch.autograd.grad_mode.__file__, torch.overrides.__file__)


def model_in_bfloat16(kind=BertModel, layers=1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 4, "vocab_size": 16}
    config = BertConfig(**sizes, num_hidden_layers=layers)
    model = kind(config).to(torch.bfloat16).train()
    next(model.parameters()).requires_grad_(False)
    return model


@cache
def teacher():
    """Made once: a copy of a tensor, which PyTorch makes with gradients off, is not of this library."""
    return model_in_bfloat16()


def score(model):
    secateur.score(model, TEXTS, "contribution", TOKENIZER, reading=READING)


def score_neurons(model):
    secateur.score(model, TEXTS, "contribution", TOKENIZER, reading=READING, units=["heads", "neurons"])


def refine(model):
    secateur.refine_mask(model, MASK, TEXTS, TOKENIZER, steps=1, reading=READING)


def reconstruct(model):
    secateur.reconstruct_(model, MASK, TEXTS, TOKENIZER, reading=READING)


def remove(model):
    secateur.remove_(model, MASK)


def remove_all_kinds(model):
    sites = secateur.find_units(model, ["heads", "neurons", "layers"])
    kept = {name: torch.arange(site.num_units) > (name != "encoder.layer.0") - 1 for name, site in sites.items()}
    secateur.remove_(model, secateur.Mask(kept))


def distill(model):
    secateur.distill_(model, teacher(), MORE_TEXTS, TOKENIZER, steps=1, reading=READING)


def prune(model):
    secateur.prune(model, TEXTS, 0.5, scorer="magnitude", tokenizer=TOKENIZER, reading=READING)


def evaluate(model):
    evaluate_model(model, TOKENIZER, TASK, reading=READING)


def tune(model):
    finetune(model, TASK, tokenizer=TOKENIZER, epochs=1, reading=READING)


def bench(model):
    benchmark({"one": model}, [Shape(1, 4)], rounds=1, train=True)


@dataclass(frozen=True)
class Call:
    """What is interrupted, where the suite does it, and what the call may leave changed."""

    run: Callable
    moments: range | tuple = ()
    model: Callable = model_in_bfloat16
    trains: bool = False  # in place: weights have moved, the seed is set, and the model may be in another mode
    copies: bool = False  # so that the model itself stays as it was

    def drawn(self, total):
        """The moments to try, counted from the end where they are negative."""
        if CASES <= FULL:
            return self.moments
        if self.run is all_contexts:
            return range(total)
        seed = int.from_bytes(os.urandom(4), "big")
        print(f"moments drawn with seed {seed}")
        return sorted(random.Random(seed).sample(range(total), min(total, CASES // (1000 if self.trains else 100))))


def classifier():
    return model_in_bfloat16(BertForSequenceClassification)


def state_of(model):
    """All that a call may not leave half done."""
    weights = {name: (t.dtype, t.float().numpy().tobytes()) for name, t in model.state_dict().items()}
    own, rest = {k: v for k, v in vars(model).items() if k.startswith("_secateur")}, condition(model.float())
    model.to(torch.bfloat16)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return weights, own, rest[1:], modes, len(torch.overrides._get_current_function_mode_stack())


def _but_what_training_moves(state):
    """Whose heads are where, the hooks, the names of attention functions, and torch's modes."""
    _, own, (_, _, hooks, _, attention, *_), *modes = state
    return own, hooks, attention, modes


class Interrupt:
    """Sends one signal where Python would hear it: as a function begins, or as one that is written in C returns.

    Only where a context is entered or left, in our code or in what it calls of Python's and torch's.
    """

    def __init__(self, at=None):
        self.at, self.passed, self.sent = at, 0, False
        self.dropped = []  # what Python itself ignores, as it does where an object is cleaned up

    def __call__(self, frame, event, _):
        if event not in ("call", "c_return") or not _is_watched(frame):
            return
        if self.passed == self.at:
            sys.setprofile(None)
            self.sent = True
            signal.raise_signal(signal.SIGINT)
        self.passed += 1

    def run(self, call, model):
        hook, sys.unraisablehook = sys.unraisablehook, self.dropped.append
        sys.setprofile(self)
        try:
            call(model)
        finally:
            sys.setprofile(None)
            sys.unraisablehook = hook


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


CALLS = {
    "contexts": Call(all_contexts, range(0, 840, 15)),
    "score": Call(score, range(0, 2100, 350)),
    "score, neurons too": Call(score_neurons),
    "refine_mask": Call(refine),
    "reconstruct_": Call(reconstruct, range(70, 3700, 900)),
    "remove_": Call(remove, (400, 4500, -60)),
    "remove_, neurons and a layer too": Call(remove_all_kinds, (), lambda: model_in_bfloat16(layers=2)),
    "distill_": Call(distill, (500,)),
    "prune": Call(prune, (500,), copies=True),
    "evaluate": Call(evaluate, (40,), classifier),
    "finetune": Call(tune, (), classifier, trains=True),
    "measure_cost": Call(measure_cost, (100,)),
    "benchmark": Call(bench),
}


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_leaves_a_model_as_it_was_or_the_work_done(name, outcome):
    """A model that is half changed is neither what it was before nor what the call makes of it."""
    call = CALLS[name]
    if not call.drawn(1):
        return
    model, whole, tried = call.model(), Interrupt(), 0
    before, verbosity = state_of(model), logging.get_verbosity()
    if call.run is all_contexts:
        call.run(model)  # knows then where its heads are
    teacher()
    whole.run(call.run, model if not call.copies else copy.deepcopy(model))
    outcomes = [before, state_of(model)]
    for moment in call.drawn(whole.passed):
        model = model if call.run is all_contexts else call.model()
        interrupt = Interrupt(moment if moment >= 0 else whole.passed + moment)
        try:
            interrupt.run(call.run, model)
        except KeyboardInterrupt:
            tried += 1
        else:
            # Another pass may take fewer steps than the first.
            assert not interrupt.sent or [one.exc_type for one in interrupt.dropped] == [KeyboardInterrupt]
        state = state_of(model)
        if call.trains:
            assert _but_what_training_moves(state) == _but_what_training_moves(before), moment
        else:
            assert state in outcomes, moment
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, True)
        all_contexts(model)  # nobody holds it
    assert tried
    came = f"{tried:,} of {whole.passed:,} moments tried: the model as it was, or the work done whole"
    outcome(SECTION, f"Ctrl-C as contexts are entered and left: {name}", came)


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


@pytest.mark.usefixtures("heard")
def test_a_package_that_makes_a_failure_of_ctrl_c_is_not_believed():
    def fail(stopped):
        with frozen(model), one_error(model, "cannot be exported"):
            try:
                if stopped:
                    signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
            raise RuntimeError("step 2") from ValueError("no such\noperation")

    model = model_in_bfloat16()
    with pytest.raises(KeyboardInterrupt):
        fail(stopped=True)
    with pytest.raises(UnsupportedModelError, match=r"exported: ValueError: no such operation$"):
        fail(stopped=False)
