"""Whatever is done to a pruned model before it is saved: the folder gives it back, or nothing is written."""

import copy
import random

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BartForCausalLM,
    BertForSequenceClassification,
    BertModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from secateur.errors import CheckpointError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.removal.saving import held_part
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.sites.recipe import read_recipe
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal, pruned, pruned_classifier
from tests.support.tiny import ADAPTED, CONFIGS, LAYERS, tiny_classifier, tiny_model, uneven_mask
from tests.support.units import even_mask, ragged_mask, small_model


def saved(model, folder, auto=AutoModel):
    """Save a model, and see that the folder gives it back: weights, and what they compute."""
    model.save_pretrained(folder)
    again = auto.from_pretrained(folder).eval()
    assert_equal(model, again)
    inputs = example_inputs(model)
    for a, b in zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True):
        assert torch.equal(a, b)
    assert {n: s.units for n, s in find_sites(model).items()} == {n: s.units for n, s in find_sites(again).items()}
    return again


def refused(model, folder, match):
    """See that a model is not saved, and that it stays as it was."""
    before, state = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        model.save_pretrained(folder)
    assert not folder.exists()
    assert model.config.to_dict() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", ADAPTED)
def test_heads_that_went_while_an_adapter_was_there_are_saved_once_it_is_merged(kind, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(target_modules=ADAPTED[kind], r=2))
    model = adapted.get_base_model()
    remove_(model, uneven_mask(find_sites(model)))
    refused(model, tmp_path / "wrapped", "lora_A.default.weight is not in the config's layers|base_layer")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    merged = adapted.merge_and_unload()
    again = saved(merged, tmp_path / "merged")
    assert "base_layer" not in str(again.config.head_pruning)
    assert "lora" not in str(again.config.head_pruning)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_model_that_got_an_adapter_after_it_lost_heads_is_not_saved_as_if_it_had_none(tmp_path):
    peft = pytest.importorskip("peft")
    model = pruned("bert")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"], r=2), model)
    refused(model, tmp_path / "one", r"query\.weight is not in the model's layers; merge or unload adapters first")


@pytest.mark.parametrize(("kind", "which"), [*((kind, 0) for kind in LAYERS), ("bert", -1), ("t5", -1)])
def test_a_layer_that_is_deleted_after_heads_were_removed(kind, which, tmp_path):
    model = pruned(kind)
    del model.get_submodule(LAYERS[kind])[which]
    refused(model, tmp_path / "counted", "is not in the model's layers; .*let the config count the layers")
    model.config.num_hidden_layers -= 1
    if kind == "t5" and which == 0:  # the first layer holds the table that all others use
        refused(model, tmp_path / "counted", "relative_attention_bias.weight is not in the model's layers")
        return
    for number, module in enumerate(m for m in model.modules() if hasattr(m, "layer_idx")):
        module.layer_idx = number
    saved(model, tmp_path / "one").save_pretrained(tmp_path / "two")


def test_a_layer_that_is_copied_takes_its_heads_along(tmp_path):
    model = pruned("bert")
    model.encoder.layer.insert(0, copy.deepcopy(model.encoder.layer[2]))
    model.config.num_hidden_layers = 4
    again = saved(model, tmp_path)
    assert [len(kept) for kept in again.config.head_pruning["kept_heads"].values()] == [2, 3, 4, 2]


def test_a_shared_bias_goes_by_the_heads_that_a_layer_kept_where_layers_change_places(tmp_path):
    """Both layers keep as many heads, so that no shape tells which is which."""
    model = tiny_model("mpnet")
    mask = uneven_mask(find_sites(model))
    one, two, three = mask
    mask = Mask({one: torch.tensor([0, 1, 1, 0]) > 0, two: torch.tensor([1, 0, 0, 1]) > 0, three: mask[three]})
    remove_(model, mask)
    del model.encoder.layer[0]
    model.config.num_hidden_layers -= 1
    again = saved(model, tmp_path / "one")
    assert again.config.head_pruning["kept_heads"][one] == [0, 3]
    changed = copy.deepcopy(again.config.head_pruning)
    changed["kept_heads"][one] = [0, 2]
    again.config.head_pruning = changed
    refused(again, tmp_path / "two", r"has the original heads \(0, 3\), and \(0, 2\) by the config")


def test_heads_go_again_after_a_layer_did(tmp_path):
    model = pruned("mpnet")
    first, second, _ = find_sites(model)
    del model.encoder.layer[0]
    model.config.num_hidden_layers -= 1
    assert [site.units for site in find_sites(model).values()] == [(0, 1, 2, 3), (1, 2)]
    result = remove_(model, Mask({second: torch.tensor([0, 1, 0, 0]) > 0}))
    assert result.mask.kept == {first: [0, 1, 2, 3], second: [1]}
    saved(model, tmp_path)


def test_a_recipe_goes_with_the_last_site(tmp_path):
    model = pruned("bert")
    del model.encoder.layer[:]
    model.config.num_hidden_layers = 0
    model.save_pretrained(tmp_path)
    assert_equal(model, AutoModel.from_pretrained(tmp_path))
    assert getattr(model.config, "head_pruning", None) is None


@pytest.mark.parametrize("change", ["shape", "width", "bias", "head"])
def test_weights_that_do_not_fit_the_config_are_named(change, tmp_path):
    model = pruned_classifier()
    layer = model.bert.encoder.layer[1]
    if change == "shape":
        layer.intermediate.dense, layer.output.dense = nn.Linear(32, 5), nn.Linear(5, 32)
        refused(model, tmp_path / "one", r"intermediate.dense.weight has the shape \(5, 32\), and \(37, 32\) by the")
    elif change == "width":
        layer.intermediate.dense, layer.output.dense = nn.Linear(32, 64), nn.Linear(64, 32)
        refused(model, tmp_path / "one", r"intermediate.dense.weight has the shape \(64, 32\), and \(37, 32\) by the")
    elif change == "bias":
        layer.extra = nn.Linear(2, 2)
        refused(model, tmp_path / "one", r"layer\.1\.extra\.weight is not in the config's layers")
    else:  # is transformers' own affair, as it is for a model that was never pruned
        model.classifier, model.bert.pooler.extra = nn.Linear(32, 9), nn.Linear(2, 2)
        model.save_pretrained(tmp_path)
        again = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=9)
        assert torch.equal(model.classifier.weight, again.classifier.weight)


def test_a_config_that_cannot_be_read_back_is_named(tmp_path):
    model = small_model("qwen3")
    remove_(model, ragged_mask(find_units(model, ["neurons"])))
    model.config.layer_types = [*model.config.layer_types, "full_attention"]
    refused(model, tmp_path / "one", "its config cannot be read back")


def test_a_class_that_asks_for_more_than_a_config_is_saved_as_it_is(tmp_path):
    class Named(BertModel):
        def __init__(self, config, name):
            super().__init__(config)
            self.name = name

    model = Named(CONFIGS["bert"](), "mine").eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    again = Named.from_pretrained(tmp_path, "mine")
    assert (again.name, again.config.head_pruning) == ("mine", model.config.head_pruning)
    assert_equal(model, again)


def test_a_model_without_its_pooler_is_saved(tmp_path):
    model = BertModel(CONFIGS["bert"](), add_pooling_layer=False).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    assert_equal(model, BertModel.from_pretrained(tmp_path, add_pooling_layer=False))


def test_weights_that_are_handed_over_are_saved_as_they_are(tmp_path):
    model = pruned("bert")
    state = model.state_dict()
    del model.encoder.layer[0]
    model.save_pretrained(tmp_path, state_dict=state)
    assert_equal(pruned("bert"), AutoModel.from_pretrained(tmp_path))


def test_saving_leaves_a_model_the_config_that_it_has(tmp_path):
    model = pruned_classifier()
    config = model.config
    model.save_pretrained(tmp_path)
    assert model.config is config is model.bert.config


def test_an_adapter_alone_is_saved_beside_no_recipe(tmp_path):
    """PEFT's layers are in no folder of the model, so nothing is compared; a copy of the pruned model takes it."""
    peft = pytest.importorskip("peft")
    model, other = pruned("bert"), pruned("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    other.load_adapter(str(tmp_path))
    assert_equal(model, other)


def test_a_part_holds_whole_lists_of_layers_or_none():
    recipe = read_recipe(pruned("t5").config)
    whole, encoder, short, nothing = (tiny_model("t5") for _ in range(4))
    del encoder.decoder, short.encoder.block[0], nothing.encoder, nothing.decoder
    part = held_part(encoder, recipe)
    assert set(part.sites) == {name for name in recipe.sites if name.startswith("encoder.")} == set(part.kept)
    assert [held_part(model, recipe) for model in (whole, short, nothing)] == [None] * 3


def test_a_config_of_its_own_forgets_what_is_no_longer_so(tmp_path):
    model = tiny_classifier("bert")
    model.config = copy.deepcopy(model.config)
    remove_(model.bert, Mask(even_mask(find_units(model, ["neurons"]))))
    model.save_pretrained(tmp_path / "even")
    assert hasattr(model.config, "pruned_from")
    remove_(model.bert, Mask(ragged_mask(find_units(model, ["neurons"]))))
    model.save_pretrained(tmp_path / "uneven")
    assert not hasattr(model.config, "pruned_from")
    assert model.config.head_pruning == model.bert.config.head_pruning
    assert_equal(model, type(model).from_pretrained(tmp_path / "uneven"))


def test_a_part_leaves_the_config_that_it_is_built_from():
    config = pruned("t5").config
    before = copy.deepcopy(config.head_pruning)
    part = T5EncoderModel(config)
    assert config.head_pruning == before
    assert len(part.config.head_pruning["kept_heads"]) < len(before["kept_heads"])


def test_saving_draws_no_random_numbers(tmp_path):
    torch.manual_seed(0)
    random.seed(0)
    wanted = torch.rand(2), random.random()
    model = pruned("bert")
    torch.manual_seed(0)
    random.seed(0)
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.rand(2), wanted[0])
    assert random.random() == wanted[1]


@pytest.mark.parametrize(
    ("kind", "whole", "part"),
    [("t5", None, T5EncoderModel), ("t5", T5ForConditionalGeneration, T5EncoderModel), ("bart", None, BartForCausalLM)],
)
def test_a_class_that_holds_a_part_of_the_sites_loads_what_it_has(kind, whole, part, tmp_path):
    model = tiny_model(kind) if whole is None else whole(CONFIGS[kind]()).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "whole")
    loaded = part.from_pretrained(tmp_path / "whole").eval()
    path = "encoder" if part is T5EncoderModel else "decoder.layers"
    inner = loaded.base_model.get_submodule(path)
    for name, value in model.base_model.get_submodule(path).state_dict().items():
        assert torch.equal(value, inner.state_dict()[name])
    if part is T5EncoderModel:
        inputs = {"input_ids": torch.arange(12).view(2, 6)}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs)[0], model.base_model.encoder(**inputs)[0])
    assert all(name.startswith(path) for name in loaded.config.head_pruning["kept_heads"])
    loaded.save_pretrained(tmp_path / "part")
    assert_equal(loaded, part.from_pretrained(tmp_path / "part"))
