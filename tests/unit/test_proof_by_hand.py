"""The parts of a proof, each by numbers that can be told by hand."""

import math

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import ModelOutput

from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import cached_step, hidden_states, largest_difference
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_neurons
from secateur.units.masks import Mask
from tests.support.tiny import tiny_model, uneven_mask
from tests.support.units import ragged_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([numbers(1, 0.5)], [numbers(1, 0.25)], 0.25),
        ([numbers(-4, 1)], [numbers(-4, 3)], 0.5),  # of the largest value, 4
        ([numbers(1), numbers(2)], [numbers(1.5), numbers(2)], 0.5),
        ([numbers()], [numbers()], 0),
        ([numbers(), numbers(1)], [numbers(), numbers(1)], 0),
        ([], [], math.inf),
        ([numbers(1)], [numbers(1), numbers(1)], math.inf),
        ([numbers(1), numbers(1)], [numbers(1)], math.inf),
        ([numbers(1)], [numbers(1, 1)], math.inf),
        ([numbers(1)], [numbers(math.nan)], math.inf),
        ([numbers(math.inf)], [numbers(math.inf)], math.inf),
    ],
)
def test_the_largest_difference(one, other, difference):
    assert largest_difference(one, other) == difference


@pytest.mark.parametrize(("tokens", "has_step"), [(1, False), (2, True), (3, True)])
def test_a_step_needs_a_token_that_is_cached_and_one_that_is_not(tokens, has_step):
    model = tiny_model("llama")
    inputs = example_inputs(model, length=tokens, padding=0)
    step = cached_step(model, inputs)
    assert (step is not None) is has_step
    if step is not None:
        assert torch.allclose(step[0], hidden_states(model, inputs)[0][:, 1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_step_says_of_the_later_tokens_what_a_whole_pass_says(kind):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    if kind == "llama":
        inputs["attention_mask"][1] = inputs["attention_mask"][1].flip(0)  # a padded start leaves nothing to cache
        inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    step = cached_step(model, inputs)
    assert torch.allclose(step[0], hidden_states(model, inputs)[0][:, 1:], atol=1e-5)


def test_no_step_where_more_than_tokens_is_read():
    model = tiny_model("llama")
    inputs = example_inputs(model, padding=0)
    assert cached_step(model, inputs) is not None
    assert cached_step(model, inputs | {"position_ids": torch.arange(12).expand(2, 12)}) is None
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    assert cached_step(model, embedded) is None


def test_no_step_where_the_model_takes_no_cache():
    model = tiny_model("llama")
    inputs = example_inputs(model, padding=0)

    def forward(input_ids, attention_mask=None):
        return pytest.fail("it was asked for one")

    model.forward = forward
    assert cached_step(model, inputs) is None


def test_all_that_a_step_returns_counts_but_the_cache():
    model = tiny_model("llama")
    inputs = example_inputs(model, padding=0)

    def forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        states = input_ids[..., None].float()
        return ModelOutput(last_hidden_state=states, past_key_values=DynamicCache(), router_logits=2 * states)

    model.forward = forward
    states, logits = cached_step(model, inputs)
    assert torch.equal(2 * states, logits)


def test_random_numbers_of_a_model_are_the_same_at_every_pass():
    class Noisy(nn.Module):
        def forward(self, hidden):
            return hidden + torch.randn(hidden.shape)

    model = tiny_model("bert")
    model.embeddings.dropout = Noisy()
    inputs = example_inputs(model)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(hidden_states(model, inputs))
    assert largest_difference(*found) == 0


@pytest.mark.parametrize(("size", "may_be_owned"), [(5, False), (8, True)])
def test_a_parameter_that_nothing_uses_may_be_of_no_heads(size, may_be_owned):
    model = tiny_model("bert")  # of four heads
    sites = find_sites(model)
    model.get_submodule(next(iter(sites))).register_parameter("spare", nn.Parameter(torch.zeros(size)))
    if may_be_owned:
        with pytest.raises(UnsupportedModelError, match="no pass of the proof uses its parameter spare"):
            remove_(model, uneven_mask(sites))
    else:
        assert remove_(model, uneven_mask(sites)).max_difference < 1e-4


def test_blocks_that_lose_neurons_are_reached():
    model = tiny_model("bert")
    sites, _ = find_neurons(model)
    assert remove_(model, Mask(ragged_mask(sites)), sites=sites).max_difference < 1e-4
