"""A pruned model is an ordinary folder: plain `from_pretrained` gives it back bit for bit."""

import copy
import inspect
import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
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
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    GptOssConfig,
    PreTrainedModel,
    SwinConfig,
    Swinv2Config,
    T5EncoderModel,
)

import secateur
from secateur.errors import CheckpointError, SecateurWarning
from secateur.models.inputs import example_inputs
from secateur.removal.checkpoint import without_hook
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.removal.replay import missing_sites
from secateur.sites.attention import find_sites
from secateur.sites.recipe import Recipe, read_recipe
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
    ours = ["removal", "removal.checkpoint", "removal.construction", "support", "support.versions"]
    assert sorted(found[3]) == [f"secateur.{name}" for name in ours]


def test_the_hook_is_installed_once():
    from secateur.removal.checkpoint import install

    wrapped = PreTrainedModel.post_init, PreTrainedModel.save_pretrained
    install()
    assert (PreTrainedModel.post_init, PreTrainedModel.save_pretrained) == wrapped
    assert list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[:2] == ["self", "save_directory"]


def test_heads_removed_from_the_base_model_alone_are_saved_with_the_task_model(tmp_path):
    config = CONFIGS["bert"]()
    model, other = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config)
    for number, kept in enumerate(([True, False, True, True], [True, False, False, True])):
        remove_(model.bert, Mask({"encoder.layer.1.attention.self": torch.tensor(kept)}))
        model.save_pretrained(tmp_path / str(number))
        again = BertForSequenceClassification.from_pretrained(tmp_path / str(number))
        assert_equal(model, again)
        assert again.config.head_pruning == model.bert.config.head_pruning
    other.save_pretrained(tmp_path / "other")  # built from the same config object, it is whole
    assert_equal(other, BertForSequenceClassification.from_pretrained(tmp_path / "other"))
    fresh = BertForSequenceClassification(CONFIGS["bert"]())
    fresh.bert = again.bert
    fresh.save_pretrained(tmp_path / "fresh")
    assert_equal(fresh, BertForSequenceClassification.from_pretrained(tmp_path / "fresh"))


def bart():
    return tiny_model("bart")


def towers():
    return Towers(CONFIGS["bert"]()).eval()


@pytest.mark.parametrize(("build", "path"), [(bart, "encoder"), (towers, "query")])
def test_heads_removed_from_another_part_alone_are_warned_of_when_the_whole_is_saved(build, path, tmp_path):
    model = build()
    part = model.get_submodule(path)
    remove_(part, uneven_mask(find_sites(part)))
    message = (
        f"removed from `{path}` of this {type(model).__name__} alone.*remove them from the whole model, or save the"
    )
    with pytest.warns(SecateurWarning, match=message):
        model.save_pretrained(tmp_path / "whole")
    part.save_pretrained(tmp_path / "part")  # what the message says works
    assert_equal(part, type(part).from_pretrained(tmp_path / "part"))


class Keeping(PreTrainedModel):
    """Holds its part's config as a dict."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = BertModel(BertConfig(**config.part))
        self.post_init()


class Replacing(BertForSequenceClassification):
    """Puts a base model of a class of its own in the place of the usual one."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = type("OwnBert", (BertModel,), {})(config)


def test_a_part_whose_config_is_kept_as_a_dict_comes_back(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, vocab_size=99)
    config.part = config.to_dict()
    model = Keeping(config).eval()
    remove_(model.encoder, uneven_mask(find_sites(model.encoder)))
    model.config.part = model.encoder.config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecateurWarning)
        model.save_pretrained(tmp_path)
    assert_equal(model.encoder, Keeping.from_pretrained(tmp_path).eval().encoder)


def test_a_base_model_that_is_put_in_the_place_of_another_comes_back(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, vocab_size=99)
    model = Replacing(config).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path)
    assert_equal(model, Replacing.from_pretrained(tmp_path).eval())


def test_a_pruned_model_as_a_part_whose_config_is_in_the_wholes_is_saved(tmp_path):
    whole = EncoderDecoderModel(
        encoder=pruned("bert"), decoder=BertForMaskedLM(BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, vocab_size=99,
            is_decoder=True, add_cross_attention=True,
        )),
    )  # fmt: skip
    whole.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path)
    assert again.encoder.encoder.layer[0].attention.self.query.out_features == 24
    assert torch.equal(again.encoder.encoder.layer[0].attention.self.query.weight,
                       whole.encoder.encoder.layer[0].attention.self.query.weight)  # fmt: skip


class Wrapped(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = BertModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return (self.head(self.encoder(input_ids, attention_mask)[0]),)


class Towers(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.query, self.answer = BertModel(config), BertModel(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return (self.query(input_ids, attention_mask)[0] + self.answer(input_ids, attention_mask)[0],)


class Second(BertPreTrainedModel):
    """A removal looks at its base model alone."""

    def __init__(self, config, teacher=None):
        super().__init__(config)
        self.bert = BertModel(config)
        self.answer = BertModel(config) if teacher is None else BertModel.from_pretrained(teacher)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return (self.bert(input_ids, attention_mask)[0] + self.answer(input_ids, attention_mask)[0],)


@pytest.mark.parametrize("kind", [Wrapped, Towers, Second])
def test_a_class_of_the_users_own_around_transformers_models_comes_back(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(CONFIGS["bert"]()).eval()
    remove_(model, uneven_mask(find_sites(model)))
    bare = kind(copy.deepcopy(model.config))
    assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert_equal(model, again)
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    again.save_pretrained(tmp_path / "again")
    assert_equal(model, kind.from_pretrained(tmp_path / "again"))


def test_a_constructor_that_reads_a_pruned_model_gets_it_pruned(tmp_path):
    model = pruned("bert")
    model.save_pretrained(tmp_path)
    assert_equal(Second(AutoConfig.from_pretrained(tmp_path), teacher=tmp_path).answer, model)


def test_a_recipe_that_does_not_fit_a_class_of_the_users_own_names_the_missing_site(tmp_path):
    model = Wrapped(CONFIGS["bert"]()).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, architectures=["Wrapped"])
    with pytest.raises(CheckpointError, match=r"the site 'encoder\.encoder\.layer\.1\.attention\.self', which Wrapped"):
        Wrapped(config)


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
        (damage(format_version=2), "format_version` must be a number from 1 to 1, got 2; a newer secateur"),
        (damage(format_version=0), "format_version` must be a number from 1 to 1, got 0"),
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


def test_a_recipe_of_another_model_names_the_missing_site(tmp_path):
    pruned("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"names the site 'encoder\.layer\.1\.attention\.self', which BertModel"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="which BertModel does not have"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


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
