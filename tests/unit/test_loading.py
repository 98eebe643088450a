"""Models and tokenizers from folders: what is not there, and what is there but cannot be loaded."""

import json
import warnings

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from secateur import cli
from secateur.errors import CheckpointError, InvalidInputError, SecateurWarning
from secateur.models.loading import check_device, find_tokenizer, load_model, load_tokenizer
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_is_found_where_there_is_one(folder):
    assert find_tokenizer(folder) is None
    tiny_tokenizer().save_pretrained(folder)
    assert find_tokenizer(folder)("good film")["input_ids"] == load_tokenizer(folder)("good film")["input_ids"]


def test_a_tokenizer_that_is_damaged_is_no_absent_one(folder):
    tiny_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    for load in (load_tokenizer, find_tokenizer):
        with pytest.raises(InvalidInputError, match="has no tokenizer that can be loaded: ") as caught:
            load(folder)
        assert len(str(caught.value).splitlines()) == 1


def test_a_hub_id_that_is_out_of_reach_has_no_tokenizer():
    assert find_tokenizer("no-such-owner/no-such-model") is None  # the tests run offline


def test_a_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidInputError, match=r"`model` must be a .gguf file that exists"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.filterwarnings("default::secateur.errors.SecateurWarning")
def test_weights_that_are_not_there_are_warned_of(folder, capsys):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = [name for name in tensors if ".layer.1.output." in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, path, {"format": "pt"})
    message = f"lacks weights of BertModel, such as {sorted(lost)[0]}: {len(lost)} are random here"
    with pytest.warns(SecateurWarning, match=message):
        load_model(folder, "cpu")
    assert cli.main(["info", str(folder)]) == 0
    assert message in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f"such as {sorted(lost)[0]}; get its files again"):
        load_model(folder, "cpu", whole=True)


def test_the_head_of_a_class_that_was_asked_for_is_not_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder, "cpu", AutoModelForSequenceClassification)


def test_an_encoder_is_not_evaluated_before_it_is_fine_tuned(folder, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "dev.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--data", str(tmp_path / "dev.csv"), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"`model` must be fine-tuned for classification, got '{folder}'; it is a BertModel; " in line
    assert f"fine-tune it first: secateur finetune {folder} --data DATA --out FOLDER" in line


def test_a_classifier_that_lacks_its_head_is_damaged(folder):
    """Its config says that it has one, so fine-tuning is not what is missing."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match="lacks weights of BertForSequenceClassification, such as classifier"):
        load_model(folder, "cpu", AutoModelForSequenceClassification, whole=True)


def test_the_meta_device_computes_nothing():
    with pytest.raises(InvalidInputError, match="`device` must be a device that this machine has"):
        check_device("meta")
