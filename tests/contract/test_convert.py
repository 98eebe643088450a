"""`secateur convert`: what transformers 4 and the paper's authors left, in today's format."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from secateur import MetaPruner, cli
from secateur.models.inputs import example_inputs
from tests.support.legacy import v4_folder
from tests.support.tiny import tiny_classifier, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def run(capsys, *arguments):
    code = cli.main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_v4_classifier_keeps_its_head_and_its_tokenizer(tmp_path, capsys):
    v4_folder(tmp_path / "v4", {0: [1], 2: [0, 3]}, tiny_classifier("bert"))
    tiny_tokenizer().save_pretrained(tmp_path / "v4")
    code, text, _ = run(capsys, tmp_path / "v4", "--out", tmp_path / "new")
    assert code == 0
    assert "BertForSequenceClassification with 9 of 12 heads" in text
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "pruned_heads" not in config
    assert config["head_pruning"]["kept_heads"]["encoder.layer.2.attention.self"] == [1, 2]
    old = AutoModelForSequenceClassification.from_pretrained(tmp_path / "v4").eval()
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "new")(["good film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(old(**batch).logits, new(**batch).logits)


def test_a_v4_model_without_a_tokenizer(tmp_path, capsys):
    v4_folder(tmp_path / "v4", {1: [2]})
    code, text, _ = run(capsys, tmp_path / "v4", "--out", tmp_path / "new", "--json")
    assert code == 0
    assert json.loads(text) == {
        "kind": "model", "class": "BertModel", "kept": 11, "heads": 12, "out": str(tmp_path / "new"),
    }  # fmt: skip
    assert not list((tmp_path / "new").glob("tokenizer*"))
    model = AutoModel.from_pretrained(tmp_path / "new")
    assert model(**example_inputs(model)).last_hidden_state.shape == (2, 12, 32)


def test_missing_weights_are_not_made_up(tmp_path, capsys):
    v4_folder(tmp_path / "v4", {1: [2]})
    path = tmp_path / "v4" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, path, {"format": "pt"})
    code, _, error = run(capsys, tmp_path / "v4", "--out", tmp_path / "new")
    assert code == 2
    assert "lacks weights of BertModel, such as encoder.layer.0.output.dense.weight" in error
    assert not (tmp_path / "new").exists()


def test_an_authors_pruner_becomes_a_folder_for_the_pruner_option(tmp_path, capsys):
    """The authors' file is a pickled state dict of the same names, without batch counts."""
    torch.manual_seed(1)
    made = MetaPruner(initial_std=0.1)
    state = {k: v for k, v in made.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "base.bin")
    code, text, _ = run(capsys, tmp_path / "base.bin", "--out", tmp_path / "pruner")
    assert code == 0
    assert f"--pruner {tmp_path / 'pruner'}" in text
    again = MetaPruner.from_pretrained(tmp_path / "pruner")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("name", ["base.bin", "large.bin"])
def test_the_pruners_that_were_released(name, shared, tmp_path, capsys):
    code, *_ = run(capsys, shared / "interop" / name, "--out", tmp_path / "pruner")
    assert code == 0
    maps = torch.softmax(torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
    old = MetaPruner.from_authors_checkpoint(shared / "interop" / name)
    with torch.no_grad():
        assert torch.equal(old(maps), MetaPruner.from_pretrained(tmp_path / "pruner").eval()(maps))


def test_anything_else_is_refused_in_one_line(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "whole")
    (tmp_path / "text.bin").write_text("no checkpoint")
    capsys.readouterr()  # saving shows a bar
    for source in (tmp_path / "whole", tmp_path / "text.bin", tmp_path / "nothing"):
        code, text, error = run(capsys, source, "--out", tmp_path / "new")
        assert (code, text, error.count("\n")) == (2, "", 1), error
        assert "with `pruned_heads` in its config, or a meta-pruner checkpoint of the paper's authors" in error
        assert not (tmp_path / "new").exists()
