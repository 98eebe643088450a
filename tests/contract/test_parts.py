"""Pruned parts of larger models, and classes of the user's own around them, come back as well."""

import copy
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    PreTrainedModel,
)

from secateur.errors import CheckpointError, SecateurWarning
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.pruned import assert_equal, pruned
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask


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
    with pytest.warns(SecateurWarning, match=message) as caught:
        model.save_pretrained(tmp_path / "whole")
    assert [one.filename for one in caught if issubclass(one.category, SecateurWarning)] == [__file__]
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
