"""Feed-forward blocks: found without names, what each neuron owns, gates and scores by hand, and what is refused."""

import copy

import pytest
import torch
from transformers import (
    ConvNextConfig,
    MixtralConfig,
    SwitchTransformersConfig,
    Wav2Vec2ConformerConfig,
)

import secateur
from secateur.errors import InvalidInputError, RemovalError, UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal import remove
from secateur.removal.proving import Special
from secateur.removal.remove import gated, remove_
from secateur.removal.verify import verify_checkpoint
from secateur.scorers import make_scorer
from secateur.sites.finding import find_neurons, find_units
from secateur.sites.gating import probe
from secateur.units.masks import Mask
from tests.support.scoring import LABELS, condition, inputs_of
from tests.support.tiny import tiny_classifier, tiny_model
from tests.support.units import even_mask, model_of, small_model

SITE = "encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("kind", "last", "sites", "neurons"),
    [
        ("bert", "encoder.layer.2.output.dense", 3, 37),
        ("vit", "layers.2.mlp.fc2", 3, 37),
        ("gpt2", "h.2.mlp.c_proj", 3, 128),
        ("llama", "layers.2.mlp.down_proj", 3, 37),
        ("gated t5", "decoder.block.2.layer.2.DenseReluDense.wo", 6, 37),
        ("modernbert", "layers.2.mlp.Wo", 3, 37),
        ("phi3", "layers.2.mlp.down_proj", 3, 37),
        ("opt", "decoder.layers.2.fc2", 3, 37),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0.ffn_output", 1, 37),
    ],
)
def test_every_block_is_found_and_loses_neurons(kind, last, sites, neurons):
    model = small_model(kind)
    before = condition(model)
    found, refused = find_neurons(model)
    assert condition(model) == before
    assert (len(found), list(found)[-1], refused) == (sites, last, {})
    assert {(site.num_units, site.num_groups, site.width) for site in found.values()} == {(neurons, neurons, 1)}
    assert remove_(model, even_mask(found), sites=found).units_after == sites * (neurons - -(-neurons // 3))


def owned(site):
    return {(piece.parameter, piece.axis, piece.role): piece.owners for piece in site.slices}


def test_what_a_neuron_owns_of_a_plain_block():
    every = tuple(range(37))
    site = find_neurons(tiny_model("bert"))[0][SITE]
    assert owned(site) == {
        ("encoder.layer.1.intermediate.dense.weight", 0, "neuron"): every,
        ("encoder.layer.1.intermediate.dense.bias", 0, "neuron"): every,
        ("encoder.layer.1.output.dense.weight", 1, "output"): every,
    }


@pytest.mark.parametrize(("kind", "first", "last"), [("modernbert", "Wi", "Wo"), ("phi3", "gate_up_proj", "down_proj")])
def test_what_a_neuron_owns_of_a_block_with_gates_in_one_weight(kind, first, last):
    every = tuple(range(37))
    site = find_neurons(tiny_model(kind))[0][f"layers.0.mlp.{last}"]
    assert owned(site) == {
        (f"layers.0.mlp.{first}.weight", 0, "neuron"): every + every,
        (f"layers.0.mlp.{last}.weight", 1, "output"): every,
    }


def test_convolutions_of_width_one_and_linear_layers_between_depthwise_ones():
    model = model_of(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32))
    found, _ = find_neurons(model)
    assert {name: site.num_units for name, site in found.items()} == {
        "encoder.stages.0.layers.0.pwconv2": 32,
        "encoder.stages.1.layers.0.pwconv2": 64,
    }


def test_units_that_are_silent_on_every_text_are_found_all_the_same():
    model = tiny_model("opt")
    wanted = {name: owned(site) for name, site in find_neurons(model)[0].items()}
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.fc1.bias -= 3  # below zero, where ReLU passes nothing on
    outputs = []
    model.decoder.layers[0].fc2.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model(**example_inputs(model))
    assert not outputs[0].flatten(0, -2).any(dim=0).all()
    assert {name: owned(site) for name, site in find_neurons(model)[0].items()} == wanted


class Wide(torch.nn.Module):
    """Neurons that are written by a convolution over three tokens."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv1d(32, 37, 3, padding=1)
        torch.nn.init.constant_(self.convolution.bias, -9)

    def forward(self, hidden):
        return torch.relu(self.convolution(hidden.transpose(1, 2)).transpose(1, 2))


def test_rectified_units_are_found_at_a_single_token_and_behind_a_wide_convolution():
    model = tiny_model("opt")
    assert len(find_neurons(model, {"input_ids": torch.tensor([[5]])})[0]) == len(find_neurons(model)[0])
    model = tiny_model("bert")
    model.encoder.layer[1].intermediate = Wide()
    site = find_neurons(model)[0][SITE]
    assert owned(site)["encoder.layer.1.intermediate.convolution.weight", 0, "neuron"] == tuple(range(37))


C = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def test_experts_are_refused():
    with pytest.raises(UnsupportedModelError, match="MixtralModel has no feed-forward block whose neurons can go"):
        find_neurons(model_of(MixtralConfig(**C, intermediate_size=32, num_key_value_heads=4, num_local_experts=2)))
    config = SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=99, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    found, refused = find_neurons(model_of(config))
    assert list(found) == ["encoder.block.0.layer.1.mlp.wo", "decoder.block.0.layer.2.mlp.wo"]
    expert = "encoder.block.1.layer.1.mlp.experts.expert_0.wo"
    assert refused[expert] == f"site {expert}: it is one of several experts, each of which reads some tokens"


CHANNELS = "encoder.layers.1.conv_module"


def conformer():
    """A model with a batch normalisation between two projections, that has seen texts."""
    config = Wav2Vec2ConformerConfig(
        **C, intermediate_size=37, conv_dim=[8, 8], conv_stride=[20, 20], conv_kernel=[20, 20],
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = model_of(config)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.conv_module.batch_norm.running_mean.normal_()
            layer.conv_module.batch_norm.running_var.uniform_(0.5, 2)
    return model


def test_what_a_batch_normalisation_keeps_of_a_channel_goes_with_its_neuron(tmp_path):
    model = conformer()
    model.save_pretrained(tmp_path / "whole")
    found, refused = find_neurons(model)
    assert (len(found), refused) == (6, {})
    mask = even_mask({name: found[name] for name in [f"{CHANNELS}.pointwise_conv2"]})
    kept, before = mask[f"{CHANNELS}.pointwise_conv2"], copy.deepcopy(model.get_submodule(CHANNELS).batch_norm)
    inputs = example_inputs(model, seed=1)
    with torch.no_grad(), gated(model, mask, found):
        wanted = model(**inputs).last_hidden_state
    remove_(model, mask, record={"base_model": str(tmp_path / "whole")})
    norm = model.get_submodule(CHANNELS).batch_norm
    assert (norm.num_features, len(norm.weight)) == (21, 21)
    assert torch.equal(norm.running_mean, before.running_mean[kept])
    assert torch.equal(norm.running_var, before.running_var[kept])
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(again(**inputs).last_hidden_state, wanted, atol=1e-5)
    verdict = verify_checkpoint(tmp_path / "small")
    assert (verdict["verdict"], verdict["differing"], verdict["weights"]) == ("equal", [], "as saved")


def test_a_removal_that_fails_puts_the_statistics_back(monkeypatch):
    model = conformer()
    before = condition(model)
    mask = even_mask({name: site for name, site in find_neurons(model)[0].items() if CHANNELS in name})
    monkeypatch.setattr(remove, "prove", lambda *given: (1.0, Special()))
    with pytest.raises(RemovalError, match="differs from the gated model by 1"):
        remove_(model, mask)
    assert condition(model) == before
    assert model.get_submodule(CHANNELS).batch_norm.num_features == 32


class Remembering(torch.nn.Module):
    """A normalisation of its own kind, with statistics of every channel."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(37))
        self.register_buffer("mean", torch.zeros(37))

    def forward(self, hidden):
        return (torch.nn.functional.gelu(hidden) - self.mean) * self.weight


def test_a_block_with_other_statistics_of_its_channels_is_refused():
    model = tiny_model("bert")
    model.encoder.layer[1].intermediate.intermediate_act_fn = Remembering()
    found, refused = find_neurons(model)
    assert SITE not in found
    assert refused == {
        SITE: f"site {SITE}: Remembering between its projections keeps statistics of every channel",
    }


class Leaking(torch.nn.Module):
    """A block's output projection, beside which something else reads the neurons."""

    def __init__(self, output, other):
        super().__init__()
        self.output, self.other = output, other

    def forward(self, hidden, stream):
        return self.output(hidden, stream) + self.other(hidden)


class Total(torch.nn.Module):
    def forward(self, hidden):
        return hidden.sum(dim=-1, keepdim=True)


def test_neurons_that_others_read_too_are_no_units():
    model = tiny_model("bert")
    layer = model.encoder.layer[1]
    layer.output = Leaking(layer.output, torch.nn.Linear(37, 32))
    assert list(find_neurons(model)[0]) == ["encoder.layer.0.output.dense", "encoder.layer.2.output.dense"]
    layer.output.other = Total()
    found, refused = find_neurons(model)
    assert list(found) == ["encoder.layer.0.output.dense", "encoder.layer.2.output.dense"]
    assert refused == {}, "it is no feed-forward block, rather than one that stays"


class Counting(torch.nn.Module):
    """An activation that counts on the number of neurons that a block began with."""

    def forward(self, hidden):
        return torch.nn.functional.gelu(hidden.view(*hidden.shape[:-1], 37))


def test_a_block_whose_code_counts_on_all_neurons_is_refused():
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = Counting()
    with pytest.raises(UnsupportedModelError, match=r"site \S+: its code counts on all neurons"):
        find_neurons(model)


def test_gates_multiply_what_the_last_projection_reads():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    gate = torch.rand(37)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight *= gate
        wanted = other(**inputs).last_hidden_state
        with probe(model, gates={SITE: gate}):
            assert torch.allclose(model(**inputs).last_hidden_state, wanted, atol=1e-5)
        rows = torch.stack([gate, torch.ones(37)])
        with probe(model, gates={SITE: rows}):
            found = model(**inputs).last_hidden_state
        assert torch.allclose(found[0], wanted[0], atol=1e-5)
        assert torch.allclose(found[1], model(**inputs).last_hidden_state[1], atol=1e-5)
        with (
            pytest.raises(UnsupportedModelError, match=f"site {SITE} reads 2 rows, so 3 gates"),
            probe(model, gates={SITE: torch.ones(3, 37)}),
        ):
            model(**inputs)


def test_a_site_without_neurons_leaves_its_bias(tmp_path):
    model = tiny_model("bert")
    mask = Mask({SITE: torch.zeros(37, dtype=torch.bool)})
    inputs = example_inputs(model)
    with torch.no_grad(), gated(model, mask):
        wanted = model(**inputs).last_hidden_state
    bias = model.encoder.layer[1].output.dense.bias.clone()
    remove_(model, mask)
    dense = model.encoder.layer[1].output.dense
    assert (dense.weight.shape, dense.in_features) == ((32, 0), 0)
    assert torch.equal(dense.bias, bias)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(**inputs).last_hidden_state, wanted, atol=1e-5)
    assert find_units(again, ("neurons",))[SITE].num_units == 0


def inner(model, inputs):
    """What the last projection of the block in the middle is given, `[batch, tokens, neurons]`."""
    taken = []
    handle = model.get_submodule(SITE).register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return taken[0]


def test_contribution_is_the_mean_square_times_the_norm_of_the_column():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    real = inner(model, inputs)[inputs["attention_mask"].bool()]  # without padding
    weight = model.get_submodule(SITE).weight
    wanted = real.double().square().mean(dim=0) * weight.double().square().sum(dim=0)
    scores = secateur.score(model, scorer="contribution", inputs=[inputs], units=["neurons"])
    assert scores.kinds[SITE] == "neurons"
    assert torch.allclose(scores[SITE], wanted, rtol=1e-5)


def test_magnitude_is_the_product_of_the_norms_of_rows_and_column():
    model = tiny_model("bert")
    layer = model.encoder.layer[1]
    wanted = layer.intermediate.dense.weight.norm(dim=1) * layer.output.dense.weight.norm(dim=0)
    scores = secateur.score(model, scorer="magnitude", units=["neurons"])
    assert torch.allclose(scores[SITE].float(), wanted)


@pytest.mark.parametrize("name", ["random", "magnitude", "contribution", "taylor", "fisher", "leave_one_out"])
def test_criteria_of_neurons(name):
    model = tiny_classifier("bert")
    before = condition(model)[:7]  # what comes after are generators that imports may use
    wanted = {"inputs": inputs_of(model), "labels": LABELS, "units": ["neurons"]}
    if "neurons" not in make_scorer(name).kinds:
        with pytest.raises(InvalidInputError, match=f"`scorer` must score neurons, got '{name}'"):
            secateur.score(model, scorer=name, **wanted)
        return
    scores = secateur.score(model, scorer=name, **wanted)
    assert condition(model)[:7] == before
    assert {site: len(row.unique()) for site, row in scores.items()} == dict.fromkeys(scores, 37)
    assert (len(scores), set(scores.kinds.values()), scores.interactions) == (3, {"neurons"}, {})


def test_the_taylor_score_is_the_gradient_of_the_gate():
    model = tiny_classifier("bert")
    inputs, labels = inputs_of(model)[0], LABELS[:4]
    name = SITE
    gate = torch.ones(4, 37, requires_grad=True)
    with probe(model, gates={name: gate}):
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
    wanted = gate.grad.abs().mean(dim=0)
    model.zero_grad()
    given = {"inputs": [inputs], "labels": labels, "units": ["neurons"], "normalize": False}
    assert torch.allclose(secateur.score(model, scorer="taylor", **given)[name].float(), wanted, rtol=1e-3)
    squares = gate.grad.square().mean(dim=0)
    given.pop("normalize")
    assert torch.allclose(secateur.score(model, scorer="fisher", **given)[name].float(), squares, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "output.dense"]), ("gpt2", ["c_attn", "mlp.c_proj"])])
def test_the_rank_of_an_adapter_is_no_width_of_a_block(kind, targets):
    peft = pytest.importorskip("peft")

    def adapted(*names):
        model = tiny_model(kind)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=list(names), r=4), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    found, refused = find_neurons(adapted(targets[0]))
    assert found == find_neurons(tiny_model(kind))[0]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in refused} == {"lora_B"}
    with pytest.raises(UnsupportedModelError, match="it is an adapter's; merge adapters into the weights first"):
        find_neurons(adapted(*targets))
