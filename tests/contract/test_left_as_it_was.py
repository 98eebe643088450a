"""What a call leaves as it was: statistics of a model in train mode, random states, gradients, hooks, switches."""

import random

import numpy as np
import pytest
import torch
from benchmarks.tiny_configs import candidate
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

import secateur
from secateur.measuring.bench import benchmark
from secateur.measuring.cost import compare_latency, measure_cost
from secateur.measuring.latency_table import measure_latency
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.scorers import SCORERS, scorer_class
from secateur.scorers.learned import GateLearningScorer
from secateur.settings import Cut, Shape
from secateur.sites.attention_maps import mean_maps
from secateur.sites.gating import count_heads, probe
from tests.support.scoring import LABELS, condition, inputs_of, options
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS, READING = tiny_texts(24), secateur.Reading(batch_size=8, max_length=16)


class Restless(nn.Module):
    """A layer that draws random numbers in every pass, and in training keeps statistics."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, nn.BatchNorm1d(32)

    def forward(self, hidden):
        torch.rand(())
        np.random.rand()
        random.random()
        self.seen(hidden.detach().flatten(0, 1))
        return self.inner(hidden)


def restless(make=tiny_model, kind="bert", seed=0):
    """In train mode, with a gradient at every second parameter, some of them frozen."""
    model = make(kind, seed=seed)
    layer = model.base_model.encoder.layer[0].output
    layer.LayerNorm = Restless(layer.LayerNorm)
    return with_gradients(model.train())


def with_gradients(model):
    torch.manual_seed(1)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    for parameter in list(model.parameters())[::5]:
        parameter.requires_grad_(False)
    return model


def all_of(model):
    gradients = {
        name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()
    }
    return (*condition(model), gradients)


def score_by(scorer):
    def run(model, sites):
        labels = LABELS if scorer_class(scorer).needs_labels else None
        with torch.random.fork_rng():
            chosen = options(scorer) | ({"epochs": 1} if issubclass(scorer_class(scorer), GateLearningScorer) else {})
        secateur.score(model, inputs=inputs_of(model), scorer=scorer, labels=labels, **chosen)

    return run


def refine(model, sites):
    secateur.refine_mask(model, uneven_mask(sites), TEXTS, tiny_tokenizer(), steps=2, reading=READING)


def see(model, sites):
    with probe(model, lambda reading: None, weights=True):
        pass


def gate(model, sites):
    with secateur.gated(model, uneven_mask(sites)):
        pass


def prune(model, sites):
    secateur.prune(model, TEXTS, tokenizer=tiny_tokenizer(), reading=READING, restore="reconstruct", cut=Cut(refine=1))


CALLS = {
    "find_sites": lambda model, sites: secateur.find_sites(model),
    "gated": gate,
    "probe": see,
    "prune": prune,
    "refine_mask": refine,
    "allocate": lambda model, sites: secateur.allocate(
        model, secateur.score(model, scorer="magnitude"), budget="macs=0.9"
    ),
    "measure_latency": lambda model, sites: measure_latency(
        model, UnitCosts(model, sites, 1, 8), Shape(1, 8), rounds=1
    ),
    "measure_cost": lambda model, sites: measure_cost(model),
    "count_heads": lambda model, sites: count_heads(model, example_inputs(model)),
    "mean_maps": lambda model, sites: mean_maps(model, sites, example_inputs(model)),
    "compare_latency": lambda model, sites: compare_latency({"one": model}, 1, 8, rounds=1),
    "benchmark": lambda model, sites: benchmark({"one": model}, [Shape(1, 8)], rounds=1, train=True),
    **{f"score by {scorer}": score_by(scorer) for scorer in SCORERS},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_everything_as_it_was(call):
    needs_labels = call.startswith("score by ") and scorer_class(call[9:]).needs_labels
    model = restless(tiny_classifier if needs_labels else tiny_model)
    with torch.random.fork_rng():
        sites = secateur.find_sites(tiny_model("bert"))
    before = all_of(model)
    CALLS[call](model, sites)
    for one, other in zip(before, all_of(model), strict=True):
        assert one == other


def half_of(teacher):
    """A pruned copy, with gradients at its parameters."""
    model = restless()
    model.load_state_dict(teacher.state_dict())
    sites = secateur.find_sites(model)
    secateur.remove_(model, secateur.Mask({name: torch.tensor([True, False, True, False]) for name in sites}))
    return with_gradients(model)


def test_distillation_changes_weights_and_nothing_else():
    teacher = restless()
    student = half_of(teacher)
    for model in (teacher, student):
        model(**example_inputs(model), output_hidden_states=True)  # transformers leaves hooks of its own that see them
    weights, before, of_teacher = condition(student)[0], all_of(student), all_of(teacher)
    secateur.distill_(student, teacher, TEXTS, tiny_tokenizer(), steps=4, reading=READING)
    after = all_of(student)
    assert {name for name in weights if weights[name] != after[0][name]} <= dict(student.named_parameters()).keys()
    assert student.config.head_pruning["distilled"]
    config = 4  # says now that it is distilled
    assert [one == other for one, other in zip(before, after, strict=True)] == [
        number not in (0, config) for number in range(len(before))
    ]
    assert all_of(teacher) == of_teacher


def test_reconstruction_changes_weights_and_nothing_else():
    model = restless()
    mask = uneven_mask(secateur.find_sites(model))
    before = all_of(model)
    secateur.reconstruct_(model, mask, TEXTS, tiny_tokenizer(), reading=READING)
    after = all_of(model)
    changed = {name for name in before[0] if before[0][name] != after[0][name]}
    assert changed
    assert all(".attention.output.dense." in name for name in changed)
    assert after[1:] == before[1:]


def test_removal_changes_the_weights_that_it_cuts_and_nothing_else():
    model = restless()
    sites = secateur.find_sites(model)
    cut = {
        piece.parameter
        for name, site in sites.items()
        for piece in site.slices
        if not name.startswith("encoder.layer.1")
    }
    before = all_of(model)
    secateur.remove_(model, uneven_mask(sites), sites=sites)
    after = all_of(model)
    assert {name for name in before[0] if before[0][name] != after[0][name]} <= cut
    assert all(after[1][name][0] == asks for name, (asks, _) in before[1].items())
    assert after[2:4] == before[2:4]
    assert after[5:9] == before[5:9]
    assert {n: g for n, g in after[10].items() if n not in cut} == {n: g for n, g in before[10].items() if n not in cut}


def test_a_conformer_in_train_mode_is_pruned_to_what_its_gated_twin_computes():
    """Batch normalisation in training takes statistics of whatever passes."""
    torch.manual_seed(0)
    model = AutoModel.from_config(candidate(CONFIG_MAPPING["wav2vec2-conformer"], 0)).train()
    assert any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    inputs = example_inputs(model)
    before = all_of(model)
    smaller, report = secateur.prune(model, scorer="magnitude")
    assert report.before.heads > report.after.heads
    scores = secateur.score(model, inputs=[inputs], scorer="contribution")
    secateur.allocate(model, scores, budget="macs=0.95")
    with secateur.gated(model, report.mask):
        wanted = hidden_states(model, inputs)
    assert largest_difference(wanted, hidden_states(smaller, inputs)) < 1e-4
    assert all_of(model) == before
    assert all(module.training for module in smaller.modules())


def test_a_model_that_draws_random_numbers_in_evaluation_mode():
    torch.manual_seed(0)
    model = AutoModel.from_config(candidate(CONFIG_MAPPING["vit_mae"], 0)).train()
    before = all_of(model)
    secateur.prune(model, scorer="magnitude")
    secateur.score(model, inputs=[example_inputs(model)], scorer="contribution")
    assert all_of(model) == before
