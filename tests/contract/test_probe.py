"""Reading and gating: equal to eager attention, differentiable, undone afterwards."""

import threading

import pytest
import torch
from transformers import AutoModel

from secateur.errors import SecateurError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.sites import gating as probe_module
from secateur.sites.attention import find_sites
from secateur.sites.gating import count_heads, probe
from tests.support.tiny import CONFIGS, tiny_model


@pytest.mark.parametrize("kind", CONFIGS)
def test_maps_equal_eager_attention(kind):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    maps = []
    with torch.no_grad(), probe(model, lambda r: maps.append(r.weights), weights=True):
        streamed = model(**inputs)
    model.set_attn_implementation("eager")
    model.config._attn_implementation_internal = "eager"  # Falcon does not listen to the public call
    with torch.no_grad():
        eager = model(**inputs, output_attentions=True)
    if hasattr(eager, "encoder_attentions"):  # reports its three kinds of site separately
        wanted = [*eager.encoder_attentions]
        for own, cross in zip(eager.decoder_attentions, eager.cross_attentions, strict=True):
            wanted += [own, cross]
    else:
        wanted = list(eager.attentions)
    assert len(maps) == len(wanted) > 0
    for one, other in zip(maps, wanted, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(streamed.last_hidden_state, eager.last_hidden_state)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_fused_twin_gates_like_the_one_with_maps(kind):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    torch.manual_seed(1)
    gates = {n: torch.rand(heads, requires_grad=True) for n, (heads, _) in count_heads(model, inputs).items()}
    results = []
    for weights in (True, False):
        with probe(model, lambda r: None, gates=gates, weights=weights):
            hidden = model(**inputs).last_hidden_state
        hidden.square().sum().backward()
        results.append((hidden.detach(), {n: g.grad.clone() for n, g in gates.items()}))
        for gate in gates.values():
            gate.grad = None
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=1e-4)
    for name in gates:
        assert results[0][1][name].abs().sum() > 0
        torch.testing.assert_close(results[0][1][name], results[1][1][name], atol=1e-3, rtol=1e-3)


def test_a_gate_of_ones_changes_nothing_and_a_zero_does():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    plain = hidden_states(model, inputs)
    site = "encoder.layer.0.attention.self"
    for gate, changes in ((torch.ones(4), False), (torch.tensor([1.0, 0, 1, 1]), True)):
        with probe(model, gates={site: gate}):
            assert (largest_difference(plain, hidden_states(model, inputs)) > 1e-3) == changes


def test_a_gate_for_each_text():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    site = "encoder.layer.1.attention.self"
    both = torch.tensor([[1.0, 0, 1, 1], [0.0, 1, 1, 1]])
    with probe(model, gates={site: both}):
        together = hidden_states(model, inputs)[0]
    for text, gate in enumerate(both):
        with probe(model, gates={site: gate}):
            alone = hidden_states(model, inputs)[0]
        torch.testing.assert_close(together[text], alone[text])


def test_padding_and_causal_masks_stay():
    for kind in ("bert", "gpt2"):
        model = tiny_model(kind)
        maps = []
        with torch.no_grad(), probe(model, lambda r: maps.append(r.weights), weights=True):  # noqa: B023
            model(**example_inputs(model))
        for map_ in maps:
            assert map_[1, :, :9, 9:].abs().max() == 0  # three padding tokens of the second text
            if kind == "gpt2":
                assert map_.triu(1).abs().max() == 0
            torch.testing.assert_close(map_[0].sum(-1), torch.ones(map_.shape[1:3]))


def test_heads_are_streamed_one_site_at_a_time():
    import weakref

    model = tiny_model("bert")
    alive: list[weakref.ref] = []
    most = []

    def watch(reading):
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(reading.weights))

    with torch.no_grad(), probe(model, watch, weights=True):
        model(**example_inputs(model))
    assert len(most) == 3
    assert max(most) <= 1  # the map of the site before may still be in a local variable of its layer, no older one


def test_contexts_nest_and_everything_is_put_back():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    site = "encoder.layer.0.attention.self"
    before = model.config._attn_implementation
    outer, inner = torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 0])
    with probe(model, gates={site: outer}), probe(model, gates={site: inner}):
        nested = hidden_states(model, inputs)
    with probe(model, gates={site: outer * inner}):
        assert largest_difference(nested, hidden_states(model, inputs)) < 1e-6
    with pytest.raises(ZeroDivisionError), probe(model, lambda r: 1 / 0):
        model(**inputs)
    assert model.config._attn_implementation == before
    assert probe_module._active == []


def test_another_model_with_the_same_config_object_is_not_gated():
    config = CONFIGS["bert"]()
    one, other = AutoModel.from_config(config).eval(), AutoModel.from_config(config).eval()
    other.config = one.config
    for module, twin in zip(one.modules(), other.modules(), strict=True):
        if hasattr(module, "config"):
            twin.config = module.config
    inputs = example_inputs(one)
    plain = hidden_states(other, inputs)
    with probe(one, gates={"encoder.layer.0.attention.self": torch.zeros(4)}):
        assert largest_difference(plain, hidden_states(other, inputs)) < 1e-5


def test_a_second_thread_is_refused_and_other_models_are_not():
    model, free = tiny_model("bert"), tiny_model("bert", seed=1)
    errors = []

    def attempt(target):
        try:
            find_sites(target)
        except SecateurError as error:
            errors.append(str(error))

    with probe(model):
        for target in (model, free):
            thread = threading.Thread(target=attempt, args=(target,))
            thread.start()
            thread.join()
    assert len(errors) == 1
    assert "in use in another thread" in errors[0]
