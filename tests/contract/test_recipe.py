"""The recipe in a config.json: what it records, and that one which is damaged or another model's is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertPreTrainedModel,
    T5EncoderModel,
)

from secateur.errors import CheckpointError
from secateur.removal.remove import remove_
from secateur.removal.replay import missing_sites
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.sites.recipe import HOW_TO_LOAD, Recipe, note_, read_recipe, read_record
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal, pruned
from tests.support.tiny import tiny_classifier, tiny_model, uneven_mask
from tests.support.units import even_mask, ragged_mask


def damage(**changes):
    def change(recipe):
        for path, value in changes.items():
            target = recipe
            *parents, last = path.split("__")
            for key in parents:
                target = target[int(key)] if isinstance(target, list) else target[key]
            target[int(last) if isinstance(target, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(format_version=3), "format_version` must be a number from 1 to 2, got 3; a newer secateur"),
        (damage(format_version=0), "format_version` must be a number from 1 to 2, got 0"),
        (damage(format_version=True), "format_version` must be a number"),
        (lambda r: r.pop("format_version"), "format_version` must be a number"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": [0, 4]}), "head indices below 4"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": [0, 5]}), "head indices below 4"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": [1, 0]}), "increasing head indices"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": [0, 0, 1]}), "increasing head indices"),
        (lambda r: r["kept_heads"].update({"elsewhere": [0]}), "for the same sites"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": [-1]}), "head indices below 4"),
        (lambda r: r["kept_heads"].update({"encoder.layer.0.attention.self": ["0"]}), "head indices below 4"),
        (lambda r: r["kept_heads"].pop("encoder.layer.0.attention.self"), "for the same sites"),
        (damage(bypassed=["encoder.layer.0.attention.self"]), "bypassed` must name sites without heads, got 'encoder"),
        (damage(layouts__0__num_key_value_heads=3), "is damaged.*4 heads do not divide among 3 key-value heads"),
        (damage(layouts__0__slices__0__0="self..weight"), "is damaged.*is no path of a module"),
        (damage(kept_heads=[]), "is damaged"),
        (damage(layouts=None), "is damaged"),
        (damage(layouts__0__num_heads=0), "is damaged.*no whole number from 1"),
        (damage(layouts__0__slices__0__3="0x8 9x24"), "is damaged.*impossible run '9x24'"),
        (damage(layouts__0__slices__0__3="0x8"), "does not fit BertModel.*the recipe expects 8"),
        (
            damage(layouts__0__slices__0__3="0x8 1x8 2x8 3x9"),
            "does not fit BertModel.*the recipe expects 33 along axis 0",
        ),
        (
            damage(layouts__0__slices__0__1=2),
            r"does not fit BertModel.*shape \(32, 32\), the recipe expects 32 along axis 2",
        ),
        (damage(layouts__0__slices__0__1=3), "does not fit BertModel.*the recipe expects 32 along axis 3"),
        (damage(layouts__0__slices__0__0="self.nothing.weight"), "does not fit BertModel.*has no weight"),
        (
            damage(layouts__0__attributes={"self.nowhere.size": "heads"}),
            "does not fit BertModel.*no number '.*nowhere.size'",
        ),
        (
            damage(layouts__0__attributes={"self.nothing": "heads"}),
            "does not fit BertModel.*no number '.*self.nothing'",
        ),
        (
            damage(layouts__0__attributes={"self.training": "heads"}),
            "does not fit BertModel.*no number '.*self.training'",
        ),
        (damage(layouts__0__attributes={"self.num_attention_heads": "many"}), "is damaged.*unknown quantity"),
    ],
)
def test_damaged_recipes_are_refused_before_any_weight_is_read(change, message, tmp_path):
    pruned("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["head_pruning"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"never to be read")
    # The file must be there but its content is only opened after the model has been built.
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_the_config_tells_how_to_load_the_model(tmp_path):
    pruned("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "import secateur before from_pretrained" in config["head_pruning"][HOW_TO_LOAD]
    assert HOW_TO_LOAD not in Recipe.from_json(config["head_pruning"]).record


def test_a_config_that_is_plain_asks_for_nothing(tmp_path):
    model = tiny_model("bert")
    sites = find_units(model, ["neurons"])
    remove_(model, even_mask(sites), sites=sites)
    assert HOW_TO_LOAD not in model.config.pruned_from


@pytest.mark.parametrize("line", ["gone", "another", None, 3, ["\n"], {"x": [{}]}])
def test_a_folder_loads_whatever_its_line_says(line, tmp_path):
    """One that was saved before has none; the digests beside the weights do not cover it."""
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_pruning"][HOW_TO_LOAD]
    if line != "gone":
        config["head_pruning"][HOW_TO_LOAD] = line
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModel.from_pretrained(tmp_path)
    assert_equal(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_equal(AutoModel.from_pretrained(tmp_path / "again"), model)


def test_groups_that_a_recipe_leaves_unequal_are_refused(tmp_path):
    pruned("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["head_pruning"]["kept_heads"]["layers.0.self_attn"] = [2, 3, 4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit LlamaModel: .*drop whole groups of 2 query heads"):
        AutoModel.from_pretrained(tmp_path)


def test_a_site_may_have_a_second_name():
    model = tiny_model("bert")
    model.again = model.encoder
    recipe = read_recipe(pruned("bert").config)
    sites = {name.replace("encoder", "again"): site for name, site in recipe.sites.items()}
    assert missing_sites(model, replace(recipe, sites=sites)) == []
    assert missing_sites(tiny_model("bert"), replace(recipe, sites=sites)) == list(sites)


@pytest.mark.parametrize(("kept", "count"), [("0:3", 3), ("0", 1)])
def test_a_recipe_that_counts_other_layers_than_the_config_is_refused(kept, count, tmp_path):
    model = tiny_model("bert")
    remove_(model, ragged_mask(find_units(model)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["head_pruning"]["kept_layers"]["encoder.layer"] = kept
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"encoder\.layer has 2 layers, the recipe keeps {count}"):
        AutoModel.from_pretrained(tmp_path)


def test_sites_that_are_alike_share_a_layout_and_others_do_not():
    recipe = pruned("bert").config.head_pruning
    assert [len(layout["sites"]) for layout in recipe["layouts"]] == [len(recipe["kept_heads"])]
    made = read_recipe(pruned("bert").config)
    first, second, third = made.sites
    changed = replace(made, sites={**made.sites, second: replace(made.sites[second], width=16)})
    written = changed.to_json()
    assert [layout["sites"] for layout in written["layouts"]] == [[first, third], [second]]
    assert Recipe.from_json(written).sites == changed.sites


@pytest.mark.parametrize("kind", ["task model", "encoder alone"])
def test_a_missing_site_is_named_where_the_class_is_not_the_checkpoints_or_in_no_mapping(kind, tmp_path):
    if kind == "task model":
        model, read, short = BertForMaskedLM(tiny_model("bert").config), AutoModel, "num_hidden_layers"
    else:
        model, read, short = T5EncoderModel(tiny_model("t5").config), T5EncoderModel, "num_layers"
    remove_(model.eval(), uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[short] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names the site"):
        read.from_pretrained(tmp_path)


def test_a_recipe_of_another_model_names_the_missing_site(tmp_path):
    pruned("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names the site 'encoder\.layer\.1\.attention\.self', which BertModel"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="which BertModel does not have"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("mask", "key"), [(ragged_mask, "head_pruning"), (even_mask, "pruned_from")])
def test_what_was_done_since_is_noted_where_the_config_tells_of_units(mask, key):
    model = tiny_model("bert")
    assert read_record(model.config) is None
    sites = find_units(model, ["neurons"])
    remove_(model, Mask(mask(sites)), sites=sites)
    whole = tiny_classifier("bert")
    whole.bert, whole.config = model, copy.deepcopy(model.config)
    note_(whole, "finetuned")
    note_(tiny_model("bert"), "finetuned")
    for config in (whole.config, model.config):
        assert getattr(config, key)["finetuned"] is True
        assert "kept_layers" not in getattr(config, key)
        record = read_record(config)
        assert (record.record["finetuned"], set(record.kept)) == (True, set(sites))


def test_blocks_that_keep_all_neurons_have_no_part_in_the_recipe():
    model = tiny_model("bert")
    sites = find_units(model, ["neurons"])
    whole, *cut = sites
    rows = {**ragged_mask(sites), whole: torch.ones(sites[whole].num_units, dtype=torch.bool)}
    remove_(model, Mask(rows), sites=sites)
    assert set(model.config.head_pruning["kept_neurons"]) == {*cut}


def test_the_recipe_records_what_was_done(tmp_path):
    model = tiny_model("bert")
    record = {"scorer": "contribution", "allocation": "uniform", "base_model": "tiny", "secateur_version": "0"}
    remove_(model, uneven_mask(find_sites(model)), record=record)
    entry = copy.deepcopy(model.config.head_pruning)
    assert {k: entry[k] for k in record} == record
    assert entry["pruning_ratio"] == 0.25
    assert entry["kept_heads"]["encoder.layer.2.attention.self"] == [1, 2]
    remove_(model, Mask({"encoder.layer.2.attention.self": torch.tensor([False, True, False, False])}))
    assert {
        k: model.config.head_pruning[k] for k in record
    } == record  # an earlier pruning's, where nothing else is said
    assert model.config.head_pruning["pruning_ratio"] == 0.333333


def test_a_whole_model_is_no_part_of_one_with_more_lists_of_layers(tmp_path):
    pruned("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["head_pruning"]["kept_heads"]["decoder.layer.0.attention.self"] = [0]
    config["head_pruning"]["layouts"][0]["sites"].append("decoder.layer.0.attention.self")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names the site 'decoder\.layer\.0\.attention\.self'"):
        AutoModel.from_pretrained(tmp_path)


class OwnConfig(BertConfig):
    model_type = "own-bert"


class OwnClassifier(BertPreTrainedModel):
    """A task model of a type that no mapping knows, and whose config names no class."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()


def test_a_missing_site_is_named_in_a_task_model_of_an_unknown_type():
    settings = pruned("bert").config.to_dict() | {"architectures": None}
    whole = OwnClassifier(OwnConfig.from_dict(settings))
    assert find_sites(whole)["encoder.layer.0.attention.self"].num_units < 4
    with pytest.raises(CheckpointError, match="names the site"):
        OwnClassifier(OwnConfig.from_dict(settings | {"num_hidden_layers": 1}))
