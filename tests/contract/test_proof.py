"""What a proof looks at: texts past the config's thresholds, and every parameter of a site that loses heads."""

import functools

import pytest
import torch
from torch import nn
from transformers import AutoModel, WhisperConfig

from secateur.errors import RemovalError, UnsupportedModelError
from secateur.measuring.cost import measure_cost
from secateur.models.inputs import example_inputs, max_length
from secateur.models.thresholds import LONGEST, long_example_inputs
from secateur.removal import proof
from secateur.removal.proof import hidden_states, largest_difference, used_parameters
from secateur.removal.remove import gated, remove_
from secateur.sites.attention import find_sites
from tests.support.tiny import tiny_model, uneven_mask

SITE = "encoder.layer.0.attention.self"
FROM = 20  # tokens


class SelfAttention:
    """Mixed into BERT's: in texts longer than `FROM` each head's outputs are multiplied by an entry of `far`."""

    def forward(self, hidden_states, *args, **kwargs):
        outputs, *rest = super().forward(hidden_states, *args, **kwargs)
        if hidden_states.shape[1] > FROM:
            heads = outputs.shape[-1] // self.attention_head_size
            outputs = outputs * self.far[:heads].repeat_interleave(self.attention_head_size)
        return outputs, *rest


def far_sighted(**settings):
    model = tiny_model("bert")
    attention = model.get_submodule(SITE)
    attention.far = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    attention.__class__ = type("FarSighted", (SelfAttention, type(attention)), {})
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_parameter_that_no_pass_uses_is_named_and_nothing_removed():
    model = far_sighted()
    sites, before = find_sites(model), weights_of(model)
    with pytest.raises(UnsupportedModelError, match=rf"site {SITE}: no pass of the proof uses its parameter far of"):
        remove_(model, uneven_mask(sites), sites=sites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"far_window": FROM}, {"parts": {"chunks": [3, FROM]}}])
def test_a_difference_past_a_threshold_of_the_config_is_found(settings):
    model = far_sighted(**settings)
    sites, before = find_sites(model), weights_of(model)
    with pytest.raises(RemovalError, match="differs from the gated model"):
        remove_(model, uneven_mask(sites), sites=sites)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_difference_that_the_callers_long_inputs_show_is_found():
    model = far_sighted()
    with pytest.raises(RemovalError, match="differs from the gated model"):
        remove_(model, uneven_mask(find_sites(model)), inputs=example_inputs(model, length=FROM + 1))


def test_a_site_that_stays_whole_may_have_a_parameter_that_no_pass_uses():
    model = far_sighted()
    mask = uneven_mask(find_sites(model))
    mask[SITE].fill_(True)
    inputs = example_inputs(model, length=FROM + 9)
    with gated(model, mask):
        preview = hidden_states(model, inputs)
    remove_(model, mask)
    assert largest_difference(preview, hidden_states(model, inputs)) <= 1e-4


def config_of(kind="bert", **settings):
    model = tiny_model(kind)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, None),
        ({"sliding_window": 8}, None),  # the usual inputs are longer
        ({"sliding_window": 12}, 24),
        ({"sliding_window": None, "attention_window": [64, 32]}, 76),
        ({"index_topk": 100, "sliding_window": 30}, 112),
        ({"rope": {"original_max_position_embeddings": 50}}, 62),
        ({"sliding_window": 511}, 512),  # as many as there are positions for
        ({"sliding_window": 512}, None),
        ({"sliding_window": 4096, "chunk_size": 40}, 52),
        ({"use_window": True, "width": 40}, None),
        ({"head_pruning": {"kept_heads": {"encoder.block.0": [40]}}}, None),
    ],
)
def test_how_long_the_text_past_all_thresholds_is(settings, length):
    inputs = long_example_inputs(config_of(**settings))
    assert (None if inputs is None else tuple(inputs["input_ids"].shape)) == (length and (1, length))


def test_the_longest_threshold_and_what_reads_no_text():
    assert long_example_inputs(config_of("t5", window=LONGEST))["decoder_input_ids"].shape == (1, LONGEST + 12)
    assert long_example_inputs(config_of("t5", window=LONGEST + 1))["input_ids"].shape == (1, 140)  # relative distances
    assert long_example_inputs(config_of("vit", window=20)) is None


def test_a_model_that_cannot_read_the_long_text_is_proved_without_it():
    model = config_of("bert", window=20)
    model.embeddings.position_ids = model.embeddings.position_ids[:, :16]
    with pytest.raises(RuntimeError):
        hidden_states(model, long_example_inputs(model))
    assert remove_(model, uneven_mask(find_sites(model))).max_difference <= 1e-4


def test_the_long_text_is_also_read_with_a_cache(monkeypatch):
    lengths = []
    honest = proof.cached_step
    monkeypatch.setattr(
        proof, "cached_step", lambda base, inputs: lengths.append(inputs["input_ids"].shape[1]) or honest(base, inputs)
    )
    model = config_of("llama", sliding_window=20)
    remove_(model, uneven_mask(find_sites(model)))
    assert lengths == [12, 32, 12, 32]


@pytest.mark.parametrize("fails", [True, False])
def test_a_step_that_the_whole_model_cannot_do_is_not_compared(fails):
    model = tiny_model("llama")
    honest = model.forward

    @functools.wraps(honest)
    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and fails:
            raise ValueError("no step with a cache")
        outputs = honest(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            outputs.last_hidden_state.fill_(torch.nan)
        return outputs

    model.forward = forward
    assert remove_(model, uneven_mask(find_sites(model))).max_difference <= 1e-4


def test_which_parameters_are_used():
    modules = {name: nn.ParameterList([torch.ones(2)]) for name in ("used", "other", "stacked")}
    used, other, stacked = (module[0] for module in modules.values())
    with used_parameters(modules) as seen:
        assert used.shape == other.shape == (2,)
        assert other.size() == (2,)
        assert other.dtype is torch.float32
        torch.add(input=torch.ones(2), other=used)
        torch.stack([torch.ones(2), stacked])
    assert seen == {"used": {"0"}, "other": set(), "stacked": {"0"}}
    with used_parameters(modules) as seen:
        other.data.sum()
    assert seen == {"used": set(), "other": {"0"}, "stacked": set()}


def test_a_decoder_of_few_positions_beside_an_encoder_of_sounds_is_not_asked_for_more():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=99, max_source_positions=32, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    assert max_length(model) == 32
    assert measure_cost(model).length == 32
