"""How long a pruning will take: what is counted, and what a fake clock makes of it."""

import itertools

import pytest
import torch

import secateur
from secateur.models.inputs import example_inputs
from secateur.pruning_time import Pace, Plan, in_words, passes_of, planned, widths_of
from secateur.scorers import make_scorer
from secateur.settings import Cut, Reading
from secateur.texts.calibration import PreparedModel
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(30)
READING = Reading(batch_size=8, max_length=16, device="cpu", progress=True)
NOTHING = {"scored": 0, "passes": 1, "measured": 0, "refine": 0, "fitted": 0, "steps": 0}
PLAN = {**NOTHING, "batch_size": 4, "widths": [2, 4], "kept": 0.5, "reach": 0.25}
PACE = Pace(forward=1.0, step=3.0, factor=0.01)


def test_a_clock_says_what_a_pass_a_step_and_a_factor_take():
    model = tiny_model("bert").train()
    batch = PreparedModel(model, tiny_tokenizer(), READING).batch(TEXTS[:8])
    state, random = model.state_dict(), torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    times = iter([10.0, 12.0, 20.0, 28.0, 30.0, 30.0 + 512**3])
    assert Pace.of(model, batch, clock=lambda: next(times)) == Pace(2 / 8, 8 / 8, 1.0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    ticks = itertools.count()
    frozen = model.requires_grad_(False)
    assert Pace.of(frozen, batch, clock=lambda: float(next(ticks))).step == 3 / 8


def test_no_gradients_are_made_where_nothing_trains(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("gradients take memory"))
    model = tiny_model("bert")
    Pace.of(model, example_inputs(model), trains=False)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"scored": 10, "passes": 2}, {"scoring": 20}),
        # Each of two sites: 3/4 of the texts for a quarter of a pass, 1/4 in half of a pass at eight sizes.
        ({"measured": 8}, {"allocation": 8 * 2 * (0.1875 + 1) + 0.72 * sum((k / 8) ** 3 for k in range(8))}),
        ({"scored": 10, "passes": 0, "refine": 5}, {"refinement": 10 * (5 + 5 + 3)}),
        # Three passes and a quarter of one for each site; thirteen factors of half the width.
        ({"fitted": 10}, {"reconstruction": 35 + 13 * 0.72 / 8}),
        # The teacher's pass, and half of a step.
        ({"steps": 3}, {"distillation": 3 * 4 * (1 + 1.5)}),
        ({}, {}),
    ],
)
def test_phases_are_counted_in_passes_steps_and_factors(given, seconds):
    assert Plan(**{**PLAN, **given}).seconds(PACE) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("scorer", "passes"),
    [("magnitude", 0), ("matching", 1), ("leave_one_out", 13), ("relational_taylor", 3), ("fisher", 12), ("l0", 18)],
)
def test_passes_of_a_criterion(scorer, passes):
    assert passes_of(make_scorer(scorer), 12) == passes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"scoring": 9.2, "distillation": 20}, "about 30 s: scoring 10 s, distillation 20 s"),
        ({"scoring": 10, "distillation": 290}, "about 5 min: scoring 10 s, distillation 5 min"),
    ],
)
def test_how_long_is_said_in_words(seconds, words):
    assert in_words(seconds) == words


def test_what_a_pruning_will_do_is_planned():
    prepared = PreparedModel(tiny_model("bert"), tiny_tokenizer(), READING)
    criteria = {"heads": make_scorer("matching"), "neurons": make_scorer("contribution")}
    cut = Cut(0.5, "sensitivity", budget="macs=0.6")
    given = {"criteria": criteria, "steps": 7}
    plan = planned(prepared, TEXTS, READING, cut=cut, restore="distill", **given)
    assert plan == Plan(30, 2, 30, 0, 30, 7, 8, [32, 32, 32, 37, 37, 37], 0.6, 0.5)
    assert widths_of(prepared.base, prepared.layers) == []
    plan = planned(prepared, TEXTS, Reading(stop=9), cut=Cut(0.25, refine=2), restore="none", **given)
    assert (plan.scored, plan.measured, plan.refine, plan.fitted, plan.steps, plan.kept) == (9, 0, 2, 0, 0, 0.75)


def test_it_is_said_before_the_work_where_progress_is_shown(capsys):
    given = {"tokenizer": tiny_tokenizer(), "scorer": "contribution"}
    secateur.prune(tiny_model("bert"), TEXTS, 0.5, reading=READING, **given)
    said = capsys.readouterr().err
    assert "about " in said
    assert said.index(" s: scoring ") < said.index(" s, reconstruction ") < said.index("reconstructing:")
    secateur.prune(tiny_model("bert"), TEXTS, 0.5, reading=Reading(max_length=16, device="cpu"), **given)
    assert capsys.readouterr().err == ""
