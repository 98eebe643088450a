"""Who builds whom: constructors note it while they run, and nobody else sees a difference."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel

from secateur.removal.construction import under_construction

CONFIG = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, vocab_size=99)


class Part(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config, wrong=False):
        """Build a part."""
        super().__init__(config)
        self.head = torch.nn.Linear(2, 2)
        self.seen = under_construction()
        self.post_init()
        if wrong:
            raise KeyError("wrong")


class BuildsFirst:
    """Its constructor comes before the model's."""

    def __init__(self, config):
        part = Part(config)
        super().__init__(config)
        self.part = part


class Mixed(BuildsFirst, PreTrainedModel):
    config_class = BertConfig


class Inheriting(Part):
    pass


def test_a_constructor_that_is_inherited_from_a_mixin_is_noted_too():
    model = Mixed(CONFIG)
    assert model.part.seen == (model, model.part)
    assert under_construction() == ()
    assert "__wrapped__" not in vars(BuildsFirst.__init__)


def test_a_class_without_a_constructor_of_its_own_inherits_the_noting_one():
    assert "__init__" not in vars(Inheriting)
    model = Inheriting(CONFIG)
    assert model.seen == (model,)


class Tagged:
    """Stands behind the model class, and asks for a keyword where a class is made."""

    def __init_subclass__(cls, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.tag = tag


def test_a_new_class_is_made_as_before():
    class Made(PreTrainedModel, Tagged, tag="mine"):
        config: BertConfig

    assert (Made.tag, Made.config_class) == ("mine", BertConfig)
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        type("Other", (PreTrainedModel,), {}, unknown=True)


def test_an_exception_in_a_constructor_leaves_nothing_behind():
    with pytest.raises(KeyError):
        Part(CONFIG, wrong=True)
    assert under_construction() == ()
    assert len(Part(CONFIG).seen) == 1


def test_what_from_pretrained_builds_is_a_model_of_its_own(tmp_path):
    Part(CONFIG).save_pretrained(tmp_path)

    class Reader(Part):
        def __init__(self, config):
            super().__init__(config)
            self.part = Part.from_pretrained(tmp_path)
            self.after = under_construction()

    model = Reader(CONFIG)
    assert model.part.seen == (model.part,)
    assert model.after == (model,)


def test_classes_look_and_copy_as_before():
    assert list(inspect.signature(Part).parameters) == ["config", "wrong"]
    assert list(inspect.signature(BertModel.__init__).parameters)[:2] == ["self", "config"]
    assert Part.__init__.__doc__ == "Build a part."
    assert inspect.getsource(Part.__init__).startswith("    def __init__(self, config, wrong=False)")
    assert PreTrainedModel.__init_subclass__.__module__ == "transformers.modeling_utils"
    assert next(iter(inspect.signature(PreTrainedModel.from_pretrained).parameters)) == "pretrained_model_name_or_path"
    model = BertModel(CONFIG)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is BertModel
    assert pickle.loads(pickle.dumps(BertModel.__init__)) is BertModel.__init__


def test_models_that_were_defined_before_secateur_was_imported_are_noted(tmp_path):
    script = """
from transformers import BertConfig, BertModel, BertPreTrainedModel
assert not hasattr(BertModel.__init__, "__wrapped__")
class Pair(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.one, self.other = Seeing(config), Seeing(config)
class Seeing(BertModel):
    def __init__(self, config):
        super().__init__(config)
        self.seen = under_construction()
import secateur
from secateur.removal.construction import under_construction
pair = Pair(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
assert [id(model) for model in pair.other.seen] == [id(pair), id(pair.other)]
"""
    (tmp_path / "script.py").write_text(script)  # transformers 5.0 looks for the file of a model's class
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True)
