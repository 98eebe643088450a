"""Finding heads on tiny models of many kinds, and what is refused."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, LlamaConfig, Olmo2Config

from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.sites.layout import NOBODY, AttentionSite
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask


def test_bert_heads_own_consecutive_rows():
    site = find_sites(tiny_model("bert"))["encoder.layer.1.attention.self"]
    assert (site.num_units, site.num_groups, site.width, site.group_size) == (4, 4, 8, 1)
    assert site.output == "encoder.layer.1.attention.output.dense"
    blocks = tuple(h for h in range(4) for _ in range(8))
    found = {(s.parameter.removeprefix("encoder.layer.1.attention."), s.axis, s.role): s.owners for s in site.slices}
    assert found == {
        ("self.query.weight", 0, "query"): blocks,
        ("self.query.bias", 0, "query"): blocks,
        ("self.key.weight", 0, "key"): blocks,
        ("self.key.bias", 0, "key"): blocks,
        ("self.value.weight", 0, "value"): blocks,
        ("self.value.bias", 0, "value"): blocks,
        ("output.dense.weight", 1, "output"): blocks,
    }
    assert set(site.attributes.values()) == {"heads", "width"}


def test_gpt2_heads_share_one_fused_weight():
    site = find_sites(tiny_model("gpt2"))["h.0.attn"]
    fused = {s.role: s for s in site.slices if s.parameter == "h.0.attn.c_attn.weight"}
    assert {s.axis for s in fused.values()} == {1}
    for place, role in enumerate(("query", "key", "value")):
        expected = [NOBODY] * 96
        expected[32 * place : 32 * (place + 1)] = [h for h in range(4) for _ in range(8)]
        assert fused[role].owners == tuple(expected)


def test_gpt_neox_heads_are_interleaved():
    site = find_sites(tiny_model("gpt_neox"))["layers.0.attention"]
    query = next(s for s in site.slices if s.role == "query" and s.parameter.endswith("weight"))
    assert query.owners[:24] == (0,) * 8 + (NOBODY,) * 16
    assert query.owners[24:32] == (1,) * 8


def test_grouped_queries_share_key_value_heads():
    site = find_sites(tiny_model("llama"))["layers.2.self_attn"]
    assert (site.num_units, site.num_groups, site.group_size) == (8, 4, 2)
    owners = {s.role: s.owners for s in site.slices}
    assert owners["query"] == tuple(h for h in range(8) for _ in range(4))
    assert owners["key"] == owners["value"] == tuple(h for h in range(4) for _ in range(4))
    assert site.attributes == {"layers.2.self_attn.num_key_value_groups": "group"}


def test_shared_layers_are_one_site():
    assert len(find_sites(tiny_model("albert"))) == 1


def test_encoder_decoder_sites_are_separate():
    assert sorted(find_sites(tiny_model("bart"))) == sorted(
        ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
        + [f"decoder.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "encoder_attn")]
    )


def test_task_models_and_base_models_name_sites_alike():
    config = CONFIGS["roberta"]()
    assert list(find_sites(AutoModelForSequenceClassification.from_config(config))) == list(
        find_sites(AutoModel.from_config(config))
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_layouts_survive_json(kind):
    for name, site in find_sites(tiny_model(kind)).items():
        again = AttentionSite.from_json(name, site.to_json())
        assert again == site


def test_single_head_and_multi_query():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=50)
    site = next(iter(find_sites(AutoModel.from_config(config)).values()))
    assert {(s.parameter.rsplit(".", 2)[-2], s.axis) for s in site.slices} == {
        ("query", 0), ("key", 0), ("value", 0), ("dense", 1),
    }  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 4), (5, 5), (3, 1), (32, 8)])
def test_any_number_of_heads_is_told_apart(heads, kv_heads):
    config = LlamaConfig(
        hidden_size=2 * heads, head_dim=2, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=8, vocab_size=50,
    )  # fmt: skip
    (site,) = find_sites(AutoModel.from_config(config)).values()
    owners = {piece.role: piece.owners for piece in site.slices}
    assert owners["query"] == owners["output"] == tuple(h for h in range(heads) for _ in range(2))
    assert owners["key"] == owners["value"] == tuple(h for h in range(kv_heads) for _ in range(2))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mpnet"])
def test_what_is_left_after_removal_is_what_the_unpruned_site_says(kind):
    model = tiny_model(kind)
    sites = find_sites(model)
    mask = uneven_mask(sites)
    remove_(model, mask)
    del model.config.head_pruning  # found again, not read from the recipe
    for name, site in find_sites(model).items():
        left = sites[name].kept_slices(mask[name])
        assert sorted(site.slices, key=repr) == sorted(left, key=repr)


def test_no_head_left_owns_nothing():
    site = next(iter(find_sites(tiny_model("llama")).values()))
    assert site.kept_slices(torch.zeros(8, dtype=torch.bool)) == ()
    assert site.kept_slices(torch.ones(8, dtype=torch.bool)) == site.slices


def test_finding_leaves_the_model_as_it_was():
    model = tiny_model("bert").train()
    model.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    model.encoder.layer[1].eval()
    before = _snapshot(model)
    with torch.inference_mode():
        find_sites(model)
    with torch.no_grad():
        find_sites(model)
    assert _snapshot(model) == before


def test_finding_leaves_the_model_as_it_was_after_a_failure():
    model = AutoModel.from_config(_olmo2()).train()
    before = _snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn: no weight of its query projection"):
        find_sites(model)
    assert _snapshot(model) == before


def test_half_precision_weights_come_back_bit_for_bit():
    model = tiny_model("llama").to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_sites(model)
    after = model.state_dict()
    assert all(v.dtype == after[k].dtype and torch.equal(v, after[k]) for k, v in before.items())


def test_models_without_reachable_attention_are_refused():
    from transformers import FNetConfig

    model = AutoModel.from_config(
        FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=8, vocab_size=50, pad_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="FNetModel has no attention"):
        find_sites(model)


def test_things_that_are_no_transformers_model():
    with pytest.raises(TypeError, match="`model` must be a transformers PreTrainedModel, got Linear"):
        find_sites(torch.nn.Linear(2, 2))


def test_meta_models_are_refused():
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIGS["bert"]())
    with pytest.raises(UnsupportedModelError, match="meta device"):
        find_sites(model)


def test_example_inputs_avoid_special_tokens_and_pad():
    model = tiny_model("roberta")
    inputs = example_inputs(model)
    assert not {0, 1, 2} & set(inputs["input_ids"].flatten().tolist())
    assert inputs["attention_mask"].sum(dim=1).tolist() == [12, 9]
    seen = []
    with probe(model, seen.append):
        model(**inputs)
    assert [r.site for r in seen] == [f"encoder.layer.{i}.attention.self" for i in range(3)]


def _olmo2():
    return Olmo2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=99,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _snapshot(model):
    return (
        {k: v.tolist() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        model.config._attn_implementation,
        sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
    )
