"""Gates hold whatever attention implementation is asked for: by name in the model's code, and in the middle of it."""

import copy

import pytest
import torch
from benchmarks.tiny_configs import candidate
from transformers import CONFIG_MAPPING, AutoModel, WhisperConfig, WhisperForConditionalGeneration

from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.sites.attention import find_sites
from secateur.sites.gating import count_heads, probe
from secateur.units.masks import Mask
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")
# Their code asks for the implementation's name where it leaves tokens out.
INDEXED = ["deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4", "mistral_large4"]


def ones(model, inputs):
    return {site: torch.ones(heads) for site, (heads, _) in count_heads(model, inputs).items()}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("kind", INDEXED)
def test_gates_of_ones_change_nothing_where_an_index_leaves_tokens_out(kind, maps):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    config = candidate(CONFIG_MAPPING[kind], 0)
    config.get_text_config().index_topk = 8
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    inputs = example_inputs(model, length=24, padding=0)
    plain = hidden_states(model, inputs)
    with probe(model, lambda reading: None, gates=ones(model, inputs), weights=maps):
        assert largest_difference(plain, hidden_states(model, inputs)) < 1e-5


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
@pytest.mark.parametrize("had", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_another_implementation_inside_keeps_the_gates_and_stays_afterwards(kind, had, asked):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    mask = uneven_mask(find_sites(model))
    model.set_attn_implementation(had)
    plain = hidden_states(model, inputs)
    with gated(model, mask):
        wanted = hidden_states(model, inputs)
        model.set_attn_implementation(asked)
        assert largest_difference(wanted, hidden_states(model, inputs)) < 1e-5
        model.config._attn_implementation = asked
        assert largest_difference(wanted, hidden_states(model, inputs)) < 1e-5
    assert model.config._attn_implementation == asked
    assert type(model.config._attn_implementation) is str
    assert largest_difference(plain, hidden_states(model, inputs)) < 1e-5 < largest_difference(plain, wanted)


def test_another_implementation_inside_two_contexts():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    sites = find_sites(model)
    one, two = uneven_mask(sites), Mask({name: torch.tensor([False, True, True, True]) for name in sites})
    both = Mask({name: one[name] & two[name] for name in sites})
    with gated(model, both, sites):
        wanted = hidden_states(model, inputs)
    maps = []
    with gated(model, one, sites):
        with gated(model, two, sites), probe(model, lambda reading: maps.append(reading.weights), weights=True):
            model.set_attn_implementation("eager")
            assert largest_difference(wanted, hidden_states(model, inputs)) < 1e-5
            model.set_attn_implementation("sdpa")
            assert largest_difference(wanted, hidden_states(model, inputs)) < 1e-5
        with gated(model, two, sites):
            assert largest_difference(wanted, hidden_states(model, inputs)) < 1e-5
        model.set_attn_implementation("eager")
    assert len(maps) == 6
    assert all(weights is not None for weights in maps)
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_is_run_alone_is_gated_too():
    model = tiny_model("llama")
    sites = find_sites(model)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5)[None]
    rotary = model.rotary_emb(hidden, places)

    def run():
        with torch.no_grad():
            return model.layers[0].self_attn(hidden, position_embeddings=rotary, attention_mask=None)[0]

    with gated(model, Mask({name: torch.zeros(8, dtype=torch.bool) for name in sites}), sites):
        model.set_attn_implementation("eager")
        assert not run().any()
    assert run().any()


def test_whispers_token_timestamps_are_those_of_the_gated_model():
    """It asks for eager attention itself, in the middle of `generate`."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=120, num_mel_bins=80, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made = model.generation_config
    made.alignment_heads, made.no_timestamps_token_id, made.is_multilingual = [[0, 0], [1, 1]], 100, False
    features = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(0))
    length = {"min_new_tokens": 6, "max_new_tokens": 6}

    def generated(model):
        found = model.generate(
            features, return_token_timestamps=True, return_dict_in_generate=True, output_logits=True, **length
        )
        return torch.stack(found["logits"]), found["token_timestamps"]

    sites = find_sites(model)
    nothing = {name: torch.zeros(site.num_units) for name, site in sites.items()}
    plain = generated(copy.deepcopy(model))
    with probe(model, gates=nothing):
        found = generated(model)
    assert model.config._attn_implementation == "eager"
    without = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in without.named_modules():
            if name.endswith("out_proj"):
                module.weight.zero_()
    wanted = generated(without)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (plain[0] - found[0]).abs().max() > 0.1


def test_a_gate_that_would_be_passed_over_is_an_error():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    sites = find_sites(model)
    with gated(model, uneven_mask(sites), sites):
        module = model.encoder.layer[1].attention.self
        module.config = copy.deepcopy(module.config)
        module.config._attn_implementation = "sdpa"
        with pytest.raises(UnsupportedModelError, match=r"site encoder\.layer\.1.* its gate would be passed over"):
            model(**inputs)


def test_contexts_of_two_models_that_share_a_config_keep_their_gates():
    one, other = tiny_model("bert"), tiny_model("bert", seed=1)
    for module, twin in zip(one.modules(), other.modules(), strict=True):
        if hasattr(module, "config"):
            twin.config = module.config
    inputs = example_inputs(one)
    mask = uneven_mask(find_sites(one))
    with gated(one, mask):
        wanted = hidden_states(one, inputs)
        with gated(other, mask):
            assert largest_difference(wanted, hidden_states(one, inputs)) == 0
        assert largest_difference(wanted, hidden_states(one, inputs)) == 0
    assert type(one.config._attn_implementation) is str


@pytest.mark.parametrize("had", ["eager", "sdpa"])
def test_code_that_goes_past_the_interface_with_eager_attention_only(had):
    config = CONFIGS["gpt2"]()
    config.reorder_and_upcast_attn = True
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=had).eval()
    inputs = example_inputs(model)
    plain = hidden_states(model, inputs)
    sites = find_sites(model)
    for gate, changes in ((torch.ones(4), False), (torch.zeros(4), True)):
        maps = []
        gates = dict.fromkeys(sites, gate)
        for weights in (False, True):
            with probe(model, lambda reading: maps.append(reading.weights), gates=gates, weights=weights):  # noqa: B023
                assert (largest_difference(plain, hidden_states(model, inputs)) > 1e-5) == changes
        assert [found is None for found in maps] == [True] * 3 + [False] * 3
    removal = remove_(model, uneven_mask(sites), sites=sites)
    assert removal.max_difference < 1e-5
