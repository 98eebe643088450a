"""Whole layers: found where they run one after the other, gated, taken out, and put back where that fails."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, XLMConfig

import secateur
from secateur.errors import RemovalError, UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal import proof
from secateur.removal import remove as removal
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import remove_
from secateur.sites.finding import find_layers, find_units
from secateur.sites.gating import probe
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_classifier, tiny_model
from tests.support.units import model_of, ragged_mask, small_model


def without(model, **gone):
    """Drop these layers; a list is called by the last part of its path that tells it from others."""
    rows = {}
    for name, site in find_layers(model).items():
        kept = torch.ones(site.num_units, dtype=torch.bool)
        kept[list(gone.get(name.partition(".")[0], ()))] = False
        rows[name] = kept
    return Mask(rows)


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        ("bert", {"encoder.layer": 3}),
        ("gpt2", {"h": 3}),
        ("vit", {"layers": 3}),
        ("bart", {"encoder.layers": 2, "decoder.layers": 2}),
        ("t5", {"encoder.block": 2, "decoder.block": 2}),
    ],
)
def test_lists_of_layers_are_found(kind, lists):
    assert {name: site.num_units for name, site in find_layers(small_model(kind)).items()} == lists


def test_what_is_no_chain_of_layers_is_none():
    """XLM keeps attention, norms and blocks in lists of their own; ALBERT runs one layer again and again."""
    for model in (model_of(XLMConfig(emb_dim=32, n_layers=3, n_heads=4, vocab_size=99)), tiny_model("albert")):
        with pytest.raises(UnsupportedModelError, match="has no list of layers that each run once and keep the shape"):
            find_layers(model)


@torch.no_grad()
def test_a_gate_leaves_a_layer_out_as_far_as_it_says():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    other = copy.deepcopy(model)
    other.encoder.layer = torch.nn.ModuleList([other.encoder.layer[0], other.encoder.layer[2]])
    with probe(model, gates={"encoder.layer": torch.tensor([1.0, 0.0, 1.0])}):
        closed = model(**inputs).last_hidden_state
    assert torch.allclose(closed, other(**inputs).last_hidden_state, atol=1e-6)
    states = []
    handles = [layer.register_forward_hook(lambda m, a, o: states.append((a[0], o))) for layer in model.encoder.layer]
    with probe(model, gates={"encoder.layer": torch.tensor([[1.0, 0.25, 1.0], [1.0, 1.0, 1.0]])}):
        model(**inputs)
    for handle in handles:
        handle.remove()
    taken, written = states[1][0], states[1][1]
    mixed = states[2][0]
    assert torch.allclose(mixed[0], taken[0] + 0.25 * (written[0] - taken[0]), atol=1e-6)
    assert torch.allclose(mixed[1], written[1], atol=1e-6)


@torch.no_grad()
def test_block_influence_is_how_far_a_layer_turns_the_stream():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    mask = inputs["attention_mask"].float()
    states = model(**inputs, output_hidden_states=True).hidden_states
    turned = torch.stack([1 - torch.cosine_similarity(a, b, dim=-1) for a, b in itertools.pairwise(states)])
    wanted = ((turned * mask).sum(dim=-1) / mask.sum(dim=-1)).mean(dim=-1)
    scores = secateur.score(model, scorer="block_influence", inputs=[inputs], units=["layers"])
    assert torch.allclose(scores["encoder.layer"].float(), wanted, atol=1e-5)
    assert scores.kinds == {"encoder.layer": "layers"}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "bart", "t5", "gated t5", "gemma2", "gemma3", "modernbert"])
@pytest.mark.parametrize("last", [False, True])
def test_a_model_without_some_layers_is_the_gated_one_and_reloads(kind, last, tmp_path):
    model = small_model(kind)
    found = find_layers(model)
    rows = {name: torch.ones(site.num_units, dtype=torch.bool) for name, site in found.items()}
    for row in rows.values():
        row[-1 if last or kind == "modernbert" else 0] = False
    result = remove_(model, Mask(rows), sites=found)
    assert result.max_difference <= 1e-4
    total = sum(map(len, rows.values()))
    assert (result.units_before, result.units_after) == (total, total - len(rows))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal(again, model)
    inputs = example_inputs(model)
    assert largest_difference(hidden_states(model, inputs), hidden_states(again, inputs)) == 0
    assert not hasattr(again.config, "head_pruning")


def test_the_first_block_of_t5_hands_its_table_of_biases_on():
    model = small_model("gated t5")
    tables = [half.block[0].layer[0].SelfAttention.relative_attention_bias for half in (model.encoder, model.decoder)]
    seconds = [half.block[1] for half in (model.encoder, model.decoder)]
    remove_(model, without(model, encoder=[0], decoder=[0, 2]))
    for half, table, second in zip((model.encoder, model.decoder), tables, seconds, strict=True):
        attention = half.block[0].layer[0].SelfAttention
        assert half.block[0] is second
        assert attention.relative_attention_bias is table
        assert attention.has_relative_attention_bias
        assert attention.layer_idx == 0
    assert (len(model.encoder.block), len(model.decoder.block)) == (2, 1)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, 1)


def test_only_one_half_of_an_encoder_decoder_may_lose_layers():
    model = tiny_model("bart")
    remove_(model, without(model, decoder=[0]))
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 1)
    assert model.decoder.layers[0].self_attn.layer_idx == 0


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_kinds_of_attention_stay_those_of_the_layers(kind):
    model = small_model(kind)
    before = list(model.config.layer_types)
    windows = [layer.self_attn.sliding_window for layer in model.layers]
    remove_(model, without(model, layers=[0, 1]))
    assert model.config.layer_types == before[2:]
    assert [layer.self_attn.sliding_window for layer in model.layers] == windows[2:]
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1]


def everything(model):
    """All that a removal could leave changed."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        },
        [id(module.config) for module in model.modules() if hasattr(module, "config")],
        model.config.to_dict(),
    )


def assert_unchanged(model, before):
    state, *rest = everything(model)
    assert rest == list(before[1:])
    assert state.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())


def test_a_layer_that_no_config_can_leave_out_is_refused_and_stays():
    """ModernBERT's first layer has no norm before its attention; no config asks for that of another one."""
    model = tiny_model("modernbert")
    before = everything(model)
    with pytest.raises(RemovalError, match="ModernBertModel cannot be without these layers of layers: no config asks"):
        remove_(model, without(model, layers=[0]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["bert", "gated t5", "gemma2"])
def test_everything_is_put_back_where_the_proof_fails(kind, monkeypatch):
    model = small_model(kind)
    inputs = example_inputs(model)
    before, outputs = everything(model), hidden_states(model, inputs)
    monkeypatch.setattr(proof, "largest_difference", lambda one, other: 1.0)
    with pytest.raises(RemovalError, match="differs from the gated model by 1"):
        remove_(model, ragged_mask(find_units(model)))
    assert_unchanged(model, before)
    assert largest_difference(hidden_states(model, inputs), outputs) == 0


def test_a_single_layer_may_be_left(tmp_path):
    model = tiny_model("bert")
    only = model.encoder.layer[1]
    remove_(model, without(model, encoder=[0, 2]))
    assert list(model.encoder.layer) == [only]
    assert {name: site.num_units for name, site in find_layers(model).items()} == {"encoder.layer": 1}
    model.save_pretrained(tmp_path)
    assert_equal(AutoModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("of_base", [False, True])
def test_a_task_model_loses_layers_of_its_base_model(of_base, tmp_path):
    model = tiny_classifier("bert")
    part = model.bert if of_base else model
    remove_(part, without(part, encoder=[1]))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    assert_equal(again, model)
    assert len(again.bert.encoder.layer) == 2


def test_a_model_that_is_not_what_its_config_says_keeps_its_layers():
    model = tiny_model("bert")
    model.config.num_hidden_layers = 5
    with pytest.raises(RemovalError, match="BertModel is not what its config says, so its layers cannot be counted"):
        remove_(model, without(model, encoder=[1]))


def test_units_in_a_layer_that_goes_are_counted_out():
    model = tiny_model("bert")
    found = find_units(model)
    mask = Mask({**without(model, encoder=[1])})
    result = remove_(model, mask, sites=found)
    heads, neurons, layers = 3 * 4, 3 * 37, 3
    assert result.units_before == heads + neurons + layers
    assert result.units_after == 2 * 4 + 2 * 37 + 2


def test_a_config_that_computes_something_else_is_not_taken(monkeypatch):
    model = tiny_model("bert")
    monkeypatch.setattr(removal, "difference_to", lambda *_: 1.0)
    remove_(model, ragged_mask({name: site for name, site in find_units(model, ["layers"]).items()}))
    assert model.config.head_pruning["kept_layers"] == {"encoder.layer": "1:3"}
