"""Attention past transformers' interface: what is found, what is refused, what is read."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, ProphetNetConfig, SwinConfig, ViTConfig

from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states, largest_difference
from secateur.removal.remove import gated, remove_
from secateur.scorers.score import score
from secateur.sites.attention import find_sites
from secateur.sites.direct import known_sites
from secateur.sites.gating import prepare, probe
from secateur.units.masks import Mask
from tests.support.tiny import tiny_model

DIRECT = {
    "mpnet": ("encoder.layer.0.attention.attn", "encoder.layer.0.attention.attn.o"),
    "deberta-v2": ("encoder.layer.0.attention.self", "encoder.layer.0.attention.output.dense"),
    "falcon": ("h.0.self_attention", "h.0.self_attention.dense"),
    "bloom": ("h.0.self_attention", "h.0.self_attention.dense"),
    "xglm": ("layers.0.self_attn", "layers.0.self_attn.out_proj"),
}


@pytest.mark.parametrize("kind", DIRECT)
def test_sites_and_their_output_projections(kind):
    model = tiny_model(kind)
    site, output = DIRECT[kind]
    found = find_sites(model)
    assert len(found) == 3
    assert found[site].output == output
    assert found[site].num_units == 4
    outputs = [s for s in found[site].slices_of("output") if s.parameter.endswith("weight")]
    assert [s.owners for s in outputs] == [tuple(h for h in range(4) for _ in range(8))]


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_models_that_use_the_interface_have_none(kind):
    model = tiny_model(kind)
    prepare(model)
    assert known_sites(model) == {}


@pytest.mark.parametrize("kind", DIRECT)
def test_closing_a_gate_is_zeros_in_the_output_projection(kind):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    site, output = DIRECT[kind]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule(output).weight[:, 8:16] = 0
    with probe(model, gates={site: torch.tensor([1.0, 0, 1, 1])}):
        preview = hidden_states(model, inputs)
    assert largest_difference(preview, hidden_states(twin, inputs)) < 1e-5
    assert largest_difference(preview, hidden_states(model, inputs)) > 1e-3


def test_a_model_is_looked_at_once(monkeypatch):
    from secateur.sites import direct

    model = tiny_model("mpnet")
    looks = []
    honest = direct._look
    monkeypatch.setattr(direct, "_look", lambda *args: looks.append(1) or honest(*args))
    for _ in range(3):
        find_sites(model)
    assert len(looks) == 1


@pytest.mark.parametrize("kind", ["mpnet", "xglm"])
def test_hooks_go_with_the_context_also_after_an_error(kind):
    model = tiny_model(kind)
    inputs = example_inputs(model)
    with pytest.raises(ZeroDivisionError), probe(model, lambda r: 1 / 0):
        model(**inputs)
    find_sites(model)
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == 0


def test_contexts_nest_and_the_inner_one_sees_the_outer_gates():
    model = tiny_model("mpnet")
    inputs = example_inputs(model)
    site = DIRECT["mpnet"][0]
    outer, inner = torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0, 1, 1, 0])
    seen = []
    with probe(model, gates={site: outer}), probe(model, seen.append, gates={site: inner}):
        nested = hidden_states(model, inputs)
    with probe(model, gates={site: outer * inner}):
        assert largest_difference(nested, hidden_states(model, inputs)) < 1e-6
    assert seen[0].outputs[:, :, 0].abs().max() == 0
    assert seen[0].outputs[:, :, 3].abs().min() > 0


def test_a_site_that_turns_to_other_code_is_not_gated_in_vain(monkeypatch):
    from transformers.models.mpnet import modeling_mpnet

    model = tiny_model("mpnet")
    inputs = example_inputs(model)
    site = DIRECT["mpnet"][0]
    find_sites(model)

    def by_hand(scores, dim):
        return scores.exp() / scores.exp().sum(dim=dim, keepdim=True)

    monkeypatch.setattr(modeling_mpnet.nn.functional, "softmax", by_hand)
    with (
        pytest.raises(UnsupportedModelError, match="attends in another way with these inputs"),
        probe(model, gates={site: torch.ones(4)}),
    ):
        model(**inputs)


def test_scorers_work_with_maps_and_without():
    model = tiny_model("mpnet")
    inputs = [example_inputs(model)]
    for scorer in ("contribution", "magnitude", "smp"):
        scores = score(model, scorer=scorer, inputs=inputs)
        assert all(len(vector) == 4 for vector in scores.values())


def test_a_module_without_maps_says_so_and_contribution_works():
    from transformers import Data2VecVisionConfig

    config = Data2VecVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=16, patch_size=4
    )
    model = AutoModel.from_config(config).eval()
    inputs = [example_inputs(model)]
    with pytest.raises(UnsupportedModelError, match="does not compute attention maps; use a scorer that needs none"):
        score(model, scorer="smp", inputs=inputs)
    assert len(score(model, scorer="contribution", inputs=inputs)) == 2


def test_heads_that_an_output_layer_reads_in_two_parts_are_refused():
    """ProphetNet's decoder calls one projection for two streams: no single gate is the head."""
    config = ProphetNetConfig(
        hidden_size=32, vocab_size=99, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, ngram=2, max_position_embeddings=64,
    )  # fmt: skip
    sites = find_sites(AutoModel.from_config(config).eval())
    assert "decoder.layers.0.self_attn" not in sites
    assert "decoder.layers.0.cross_attn" in sites


def test_windows_are_gated_together_and_never_one_by_one():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    sites = find_sites(model)
    first = next(iter(sites))
    with (
        pytest.raises(UnsupportedModelError, match="attends within 8 windows"),
        probe(model, gates={first: torch.ones(2, 2)}),
    ):
        model(**example_inputs(model))
    mask = Mask({first: torch.tensor([True, False])})
    inputs = example_inputs(model, batch=3, seed=1)
    with gated(model, mask):
        preview = hidden_states(model, inputs)
    remove_(model, mask)  # the learned bias of the windows loses a column too
    assert largest_difference(preview, hidden_states(model, inputs)) < 1e-5


def test_a_model_that_needs_its_own_inputs_is_not_gated_blindly(monkeypatch):
    """Without a pass nobody knows where the heads are: an ignored gate would be silently wrong."""
    from secateur.sites import direct

    def refuse(*args, **kwargs):
        raise UnsupportedModelError("no example can be made")

    model = tiny_model("mpnet")
    inputs = example_inputs(model)
    monkeypatch.setattr(direct, "example_inputs", refuse)
    site = DIRECT["mpnet"][0]
    gates = {site: torch.tensor([1.0, 0, 1, 1])}
    with pytest.raises(UnsupportedModelError, match="call `find_sites` with `inputs`"), probe(model, gates=gates):
        pass
    find_sites(model, inputs)
    plain = hidden_states(model, inputs)
    with probe(model, gates=gates):
        assert largest_difference(plain, hidden_states(model, inputs)) > 1e-3


def test_another_softmax_is_no_head():
    """A classifier's softmax, a router's, a pooling's: none feeds a projection head by head."""

    class Pooled(type(tiny_model("vit"))):
        def __init__(self, config):
            super().__init__(config)
            self.weigh = nn.Linear(32, 4)
            self.join = nn.Linear(128, 32)

        def forward(self, pixel_values, **kwargs):
            output = super().forward(pixel_values, **kwargs)
            hidden = output.last_hidden_state
            weights = self.weigh(hidden).softmax(dim=1)  # [batch, tokens, 4]: over tokens, for four pools
            output.pooler_output = self.join((weights.transpose(1, 2) @ hidden).flatten(1))
            return output

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, image_size=16, patch_size=4
    )
    model = Pooled(config).eval()
    prepare(model)
    assert known_sites(model) == {}
    assert len(find_sites(model)) == 1
