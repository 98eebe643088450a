"""A pruned model is an ordinary folder: plain `from_pretrained` gives it back bit for bit."""

import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from importlib import metadata

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    GptOssConfig,
    PreTrainedModel,
    SwinConfig,
    Swinv2Config,
)

import secateur
from secateur.models.inputs import example_inputs
from secateur.removal.checkpoint import without_hook
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal, pruned
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_and_saving_again(kind, tmp_path):
    model = pruned(kind)
    model.save_pretrained(tmp_path / "one")
    again = AutoModel.from_pretrained(tmp_path / "one").eval()
    assert_equal(model, again)
    inputs = example_inputs(model)
    for a, b in zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True):
        assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "two")
    assert_equal(model, AutoModel.from_pretrained(tmp_path / "two"))
    written = [json.loads((tmp_path / n / "config.json").read_text())["head_pruning"] for n in ("one", "two")]
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "opt", "deberta-v2", "bloom"])
def test_an_emptied_site_comes_back(kind, tmp_path):
    model = pruned(kind, empty=True)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert_equal(model, again)
    inputs = example_inputs(model)
    for a, b in zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True):
        assert torch.equal(a, b)
    assert list(find_sites(again).values())[1].units == () or list(find_sites(again).values())[-1].units == ()


def test_pruning_again_after_reloading(tmp_path):
    model = pruned("llama")
    model.save_pretrained(tmp_path / "one")
    again = AutoModel.from_pretrained(tmp_path / "one")
    site = "layers.2.self_attn"
    assert find_sites(again)[site].units == (2, 3, 4, 5, 6, 7)
    remove_(again, Mask({site: torch.tensor([False, False, True, False, True, False, True, False])}))
    again.save_pretrained(tmp_path / "two")
    last = AutoModel.from_pretrained(tmp_path / "two")
    assert_equal(again, last)
    assert last.config.head_pruning["kept_heads"][site] == [2, 4, 6]
    assert last.layers[2].self_attn.num_key_value_groups == 1


@pytest.mark.parametrize("order", ["self first", "all first", "one site first"])
def test_removals_that_see_different_sites_make_one_recipe(order, tmp_path):
    """Made-up inputs do not reach a decoder's cross-attention; a caller's do, and may leave sites out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    model = BertModel(BertConfig(**sizes, vocab_size=99, is_decoder=True, add_cross_attention=True)).eval()
    inputs = {**example_inputs(model), "encoder_hidden_states": torch.randn(2, 5, 32)}
    few, everything = find_sites(model), find_sites(model, inputs)
    first, *_, last = everything
    assert list(everything) != list(few)
    assert last not in few
    three, two = torch.tensor([True, True, True, False]), torch.tensor([False, True, True, False])
    if order == "self first":
        remove_(model, Mask({first: two}))
        remove_(model, Mask({last: three}), inputs=inputs, sites=find_sites(model, inputs))
    elif order == "all first":
        remove_(model, Mask({first: three, last: three}), inputs=inputs, sites=everything)
        remove_(model, Mask({first: two}))
    else:
        remove_(model, Mask({last: three}), inputs=inputs, sites={last: everything[last]})
        remove_(model, Mask({first: two}))
    recipe = model.config.head_pruning
    seen = {last: None, **few} if order == "one site first" else everything
    assert recipe["kept_heads"] == {**{name: [0, 1, 2, 3] for name in seen}, first: [1, 2], last: [0, 1, 2]}
    assert recipe["pruning_ratio"] == round(3 / (4 * len(seen)), 6)
    model.save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path).eval()
    assert_equal(model, again)
    for a, b in zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True):
        assert torch.equal(a, b)


_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
TABLES = {
    "sinks": lambda: GptOssConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8, vocab_size=99,
        intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    ),
    "bias table": lambda: SwinConfig(**_SWIN),
    "scales": lambda: Swinv2Config(**_SWIN),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_site_that_is_emptied_in_two_steps_comes_back(kind, tmp_path):
    """From a lone head nothing shows which axis of a table is the heads'; what was seen before does."""
    torch.manual_seed(0)
    model = AutoModel.from_config(TABLES[kind]()).eval()
    name, before = next(iter(find_sites(model).items()))
    kept = torch.arange(before.num_units) == 1
    for number in (1, 0):
        remove_(model, Mask({name: kept if number else ~kept & kept}))
        after = find_sites(model)[name]
        owned = [(piece.parameter, piece.axis, piece.role) for piece in before.slices] if number else []
        assert [(piece.parameter, piece.axis, piece.role) for piece in after.slices] == owned
        model.save_pretrained(tmp_path)
        assert_equal(model, AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_heads_own_after_a_removal_is_what_gradients_show(kind):
    """A recipe says what heads owned in the unpruned model; without it the present weights have to show it."""
    model = pruned(kind)
    sites = find_sites(model)
    del model.config.head_pruning
    assert {n: set(s.slices) for n, s in find_sites(model).items()} == {n: set(s.slices) for n, s in sites.items()}


@pytest.mark.parametrize(
    "auto",
    [
        AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering,
        AutoModelForMaskedLM,
    ],
)  # fmt: skip
def test_every_auto_class_reads_a_base_checkpoint(auto, tmp_path):
    model = pruned("roberta")
    model.save_pretrained(tmp_path)
    task_model = auto.from_pretrained(tmp_path)
    for name, value in task_model.base_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_a_pruned_task_model_is_read_by_its_class_and_as_a_base(auto, tmp_path):
    torch.manual_seed(0)
    model = auto.from_config(CONFIGS["bert"]())
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    assert_equal(model, auto.from_pretrained(tmp_path))
    base = AutoModel.from_pretrained(tmp_path)
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, base.state_dict()[name])


def test_causal_models(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]())
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_half_precision_and_from_config(tmp_path):
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.encoder.layer[0].attention.self.query.weight.shape == (24, 32)
    assert half.dtype == torch.bfloat16
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_models_without_a_recipe_load_exactly_as_before(tmp_path):
    """The same folder, read before and after secateur is imported: same weights, classes and modules."""
    tiny_model("bert").save_pretrained(tmp_path)
    script = """
import sys, hashlib, json
from transformers import AutoModelForSequenceClassification
import torch
def seen():
    torch.manual_seed(0)
    m = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
    digest = hashlib.sha256()
    for n, v in m.state_dict().items(): digest.update(n.encode() + v.numpy().tobytes())
    names = [type(x).__name__ + n + str(sorted(k for k in vars(x) if "secateur" in k)) for n, x in m.named_modules()]
    ours = [k for k in sys.modules if k.startswith("secateur.")]
    return [digest.hexdigest(), names, m.config.to_dict(), ours]
without = seen()
import secateur
print(json.dumps([without, seen()]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    without, found = json.loads(done.stdout)
    assert found[:3] == without[:3]
    assert without[3] == []
    # With secateur imported, not even its model code is loaded for a model without a recipe.
    ours = """errors removal removal.checkpoint removal.construction removal.digest
        support support.interrupts support.parsing support.versions"""
    assert sorted(found[3]) == [f"secateur.{name}" for name in ours.split()]


def test_the_hook_is_installed_once():
    from secateur.removal.checkpoint import install

    wrapped = PreTrainedModel.post_init, PreTrainedModel.save_pretrained
    install()
    assert (PreTrainedModel.post_init, PreTrainedModel.save_pretrained) == wrapped
    assert list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[:2] == ["self", "save_directory"]


def test_models_are_built_whole_where_the_hook_is_off():
    config = pruned("bert").config
    widths = []
    for off in (False, True, False):
        with without_hook() if off else nullcontext():
            widths.append(BertModel(config).encoder.layer[0].attention.self.query.out_features)
    assert widths[0] == widths[2] < widths[1] == config.hidden_size
    with pytest.raises(KeyError), without_hook():
        raise KeyError
    assert BertModel(config).encoder.layer[0].attention.self.query.out_features == widths[0]


def test_a_package_that_is_not_installed_but_lies_on_the_path_prunes_and_says_its_version(monkeypatch):
    found = metadata.Distribution.from_name

    def not_installed(name):
        if name == "secateur":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", not_installed)
    pruned, report = secateur.prune(tiny_model("bert"), scorer="magnitude")
    assert report.versions["secateur"] == pruned.config.head_pruning["secateur_version"] == secateur.__version__
    assert report.versions["torch"] == torch.__version__
