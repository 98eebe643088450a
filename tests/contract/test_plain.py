"""Cut models whose config says all by its own numbers: no recipe, and they load where secateur is not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.bert import modeling_bert

import secateur
from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.removal import plain
from secateur.removal import remove as removal
from secateur.removal.plain import say_plainly_
from secateur.removal.remove import remove_
from secateur.removal.verify import load_original, verify_checkpoint
from secateur.sites import gating
from secateur.sites.finding import find_units
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer
from tests.support.units import even_mask, ragged_mask, small_model

# What can go from each without a recipe, and the numbers of the config that say so.
KINDS = {
    "bert": (("neurons", "layers"), {"intermediate_size": 24, "num_hidden_layers": 2}),
    "distilbert": (("neurons", "layers"), {"hidden_dim": 24, "n_layers": 2}),
    "roberta": (("neurons", "layers"), {"intermediate_size": 24, "num_hidden_layers": 2}),
    "vit": (("neurons", "layers"), {"intermediate_size": 24, "num_hidden_layers": 2}),
    "modernbert": (("neurons", "layers"), {"intermediate_size": 24, "num_hidden_layers": 2}),
    "gpt2": (("neurons", "layers"), {"n_inner": 85, "n_layer": 2}),
    "llama": (("heads", "neurons", "layers"), {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
    "qwen3": (("heads", "neurons", "layers"), {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": (("heads", "neurons", "layers"), {"num_attention_heads": 2, "intermediate_size": 24}),
    "gated t5": (("neurons", "layers"), {"d_ff": 24, "num_layers": 2, "num_decoder_layers": 2}),
    "bart": (("neurons", "layers"), {"encoder_ffn_dim": 21, "decoder_ffn_dim": 21, "encoder_layers": 1}),
    "albert": (("neurons",), {"intermediate_size": 24}),
}

ELSEWHERE = """
import sys
sys.modules["secateur"] = None  # an import of it fails
import torch
from transformers import AutoModel
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**torch.load(folder + "/inputs.pt"))
    torch.save(output[0], folder + "/elsewhere.pt")
"""


def even_cut(kind):
    """A model without the same units everywhere; of grouped heads two groups of four."""
    model = small_model(kind)
    sites = find_units(model, KINDS[kind][0])
    rows = dict(even_mask(sites))
    for name, site in sites.items():
        if site.group_size > 1:
            rows[name] = torch.arange(site.num_units) >= site.num_units // 2
    remove_(model, Mask(rows), sites=sites)
    return model


def test_folders_load_where_secateur_is_not(tmp_path):
    wanted = {}
    for kind, (_, numbers) in KINDS.items():
        model, folder = even_cut(kind), tmp_path / kind.replace(" ", "_")
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert "head_pruning" not in config, kind
        assert {name: config[name] for name in numbers} == numbers, kind
        inputs = example_inputs(model)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            wanted[folder] = model(**inputs)[0]
        assert_equal(AutoModel.from_pretrained(folder), model)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, wanted)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for folder, output in wanted.items():
        assert torch.equal(torch.load(folder / "elsewhere.pt"), output), folder.name


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "gated t5"])
def test_heads_whose_size_follows_from_their_number_need_a_recipe(kind):
    model = small_model(kind)
    remove_(model, even_mask(find_units(model, ["heads"])))
    assert model.config.head_pruning["kept_heads"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_cut_of_unlike_widths_needs_a_recipe(kind):
    model = small_model(kind)
    config = model.config.to_dict()
    sites = find_units(model, ["neurons"])
    remove_(model, ragged_mask(sites))
    assert set(model.config.head_pruning["kept_neurons"]) == set(sites)
    assert {name: value for name, value in model.config.to_dict().items() if name != "head_pruning"} == config


def test_two_halves_may_have_widths_of_their_own():
    model = tiny_model("bart")
    rows = {}
    for name, site in find_units(model, ["neurons"]).items():
        rows[name] = torch.arange(site.num_units) < (10 if name.startswith("encoder") else 20)
    remove_(model, Mask(rows))
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim, model.config.d_model) == (10, 20, 32)
    assert not hasattr(model.config, "head_pruning")


def test_a_recipe_goes_once_a_later_cut_makes_all_sites_alike(tmp_path):
    model = tiny_model("bert")
    remove_(model, ragged_mask(find_units(model, ["neurons"])))
    sites = find_units(model, ["neurons"])
    assert {site.original_num_units for site in sites.values()} == {37}
    rows = {name: torch.zeros(37, dtype=torch.bool) for name in sites}
    for name, site in sites.items():
        rows[name][list(site.units[:30])] = True
    remove_(model, Mask(rows))
    assert (model.config.intermediate_size, hasattr(model.config, "head_pruning")) == (30, False)
    # Units count from what the config says from then on, as nothing else is known.
    assert {site.units for site in find_units(model, ["neurons"]).values()} == {tuple(range(30))}
    remove_(model, ragged_mask(find_units(model)))
    model.save_pretrained(tmp_path)
    assert_equal(AutoModel.from_pretrained(tmp_path), model)
    assert model.config.head_pruning["layouts"][1]["num_neurons"] == 30


@pytest.mark.parametrize("of_base", [False, True])
def test_a_task_model_tells_what_its_base_model_lost(of_base, tmp_path):
    model = tiny_classifier("bert")
    other = type(model)(model.config)
    part = model.bert if of_base else model
    remove_(part, even_mask(find_units(part, ["neurons", "layers"])))
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_equal(again, model)
    assert (again.config.intermediate_size, again.config.num_hidden_layers, again.config.num_labels) == (24, 2, 3)
    assert other.config.intermediate_size == 37


def test_a_part_that_the_config_does_not_tell_of_is_warned_of(tmp_path):
    class Pair(type(tiny_model("bert"))):
        def __init__(self, config):
            super().__init__(config)
            self.second = type(tiny_model("bert"))(config)

    model = Pair(tiny_model("bert").config)
    remove_(model.second, even_mask(find_units(model.second, ["neurons"])))
    with pytest.warns(secateur.errors.SecateurWarning, match="units were removed from `second` of this Pair alone"):
        model.save_pretrained(tmp_path)


def test_a_model_that_is_not_what_its_config_says_keeps_a_recipe():
    model = tiny_model("bert")
    model.pooler = None
    remove_(model, even_mask(find_units(model, ["neurons"])))
    assert model.config.head_pruning["kept_neurons"]
    assert model.config.intermediate_size == 37


def plain_numbers(monkeypatch, change):
    """The config of a cut BERT after a removal in which `change` follows upon its plain numbers, and can be undone."""

    def say_and_change(model, recipe, undo):
        said = say_plainly_(model, recipe, undo)
        change(model, undo)
        return said

    monkeypatch.setattr(removal, "say_plainly_", say_and_change)
    model = tiny_model("bert")
    sites = find_units(model, ["neurons"])
    inputs = example_inputs(model)
    with secateur.gated(model, even_mask(sites), sites), torch.no_grad():
        wanted = model(**inputs)[0]
    remove_(model, even_mask(sites), sites=sites)
    with torch.no_grad():
        assert torch.allclose(model(**inputs)[0], wanted, atol=1e-5)
    return model.config


def double_the_embeddings(model, undo):
    weight = model.embeddings.word_embeddings.weight
    undo.append(lambda: weight.data.div_(2))
    weight.data.mul_(2)


def fail(model, undo):
    raise RuntimeError("shapes of another width")


def test_numbers_with_which_a_model_computes_something_else_are_taken_back(monkeypatch):
    config = plain_numbers(monkeypatch, double_the_embeddings)
    assert (config.intermediate_size, len(config.head_pruning["kept_neurons"])) == (37, 3)


def test_numbers_with_which_a_model_does_not_run_are_taken_back(monkeypatch):
    config = plain_numbers(monkeypatch, fail)
    assert (config.intermediate_size, len(config.head_pruning["kept_neurons"])) == (37, 3)


def with_eager_attention(monkeypatch, change):
    """What makes maps attend by `change(outputs, weights)` from then on."""

    def attend(module, *args, **kwargs):
        return change(*modeling_bert.eager_attention_forward(module, *args, **kwargs))

    own = gating._own_function
    return lambda model, undo: monkeypatch.setattr(
        gating, "_own_function", lambda kind, of: attend if kind == "eager" else own(kind, of)
    )


def test_attention_maps_are_looked_at_too(monkeypatch):
    change = with_eager_attention(monkeypatch, lambda outputs, weights: (2 * outputs, weights))
    config = plain_numbers(monkeypatch, change)
    assert (config.intermediate_size, len(config.head_pruning["kept_neurons"])) == (37, 3)


def test_a_model_without_attention_maps_has_plain_numbers(monkeypatch):
    def none(outputs, weights):
        raise UnsupportedModelError("it computes none")

    config = plain_numbers(monkeypatch, with_eager_attention(monkeypatch, none))
    assert (config.intermediate_size, hasattr(config, "head_pruning")) == (24, False)


def test_no_more_configs_are_tried_than_some(monkeypatch):
    tried = []
    monkeypatch.setattr(plain, "twin_of", lambda model, data: tried.append(data))
    model = small_model("gpt2")
    remove_(model, even_mask(find_units(model, ["neurons"])))
    assert 1 < len(tried) <= plain._MOST_TRIES
    assert model.config.head_pruning["kept_neurons"]


def test_a_plain_folder_is_verified_by_what_its_config_has_for_the_record(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "whole")
    model, _ = secateur.prune(
        tmp_path / "whole", scorer="random", pruning_ratio=0.4, cut=secateur.Cut(units=["neurons", "layers"])
    )
    assert (model.config.num_hidden_layers, hasattr(model.config, "head_pruning")) == (2, False)
    model.save_pretrained(tmp_path / "small")
    found = verify_checkpoint(tmp_path / "small")
    assert (found["verdict"], found["against"]) == ("equal", str(tmp_path / "whole"))
    assert found["units"] == {"neurons": [3 * 37, 2 * model.config.intermediate_size], "layers": [3, 2]}
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 2] += 1
    model.save_pretrained(tmp_path / "small")
    assert verify_checkpoint(tmp_path / "small")["verdict"] == "differs"


def test_a_cut_of_a_plain_cut_that_was_never_saved_names_no_original():
    model = tiny_model("bert")
    model.name_or_path = "somewhere/bert"
    remove_(model, even_mask(find_units(model, ["neurons"])))
    assert model.config.pruned_from["base_model"] == "somewhere/bert"
    remove_(model, ragged_mask(find_units(model, ["neurons"])))
    assert not hasattr(model.config, "pruned_from")
    assert "base_model" not in model.config.head_pruning  # units count from a width that it never had


def test_what_follows_works_on_a_plain_cut(tmp_path):
    teacher, tokenizer = tiny_model("bert"), tiny_tokenizer()
    model, report = secateur.prune(teacher, scorer="random", pruning_ratio=0, cut=secateur.Cut(units=["layers"]))
    assert report.units == {"layers": (3, 3)}
    remove_(model, even_mask(find_units(model, ["neurons"])))
    before, after = secateur.distill_(model, teacher, tiny_texts(24), tokenizer, steps=2)
    assert after <= before
    again, report = secateur.prune(model, scorer="magnitude", pruning_ratio=0.5)
    assert (report.before.heads, report.after.heads) == (12, 6)
    again.save_pretrained(tmp_path / "twice")
    assert_equal(AutoModel.from_pretrained(tmp_path / "twice"), again)
    for one in (teacher, model):
        one.save_pretrained(tmp_path / str(id(one)))
    found = verify_checkpoint(tmp_path / str(id(model)), tmp_path / str(id(teacher)))
    assert found["verdict"] == ("trained" if after < before else "equal")
    original, _ = load_original(model, "it", tmp_path / str(id(teacher)))  # as distilling it once more asks for
    assert original.config.intermediate_size == 37
    # What is cut of a plain cut is verified against that.
    assert verify_checkpoint(tmp_path / "twice", tmp_path / str(id(model)))["equal"]
