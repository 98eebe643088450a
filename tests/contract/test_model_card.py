"""What `secateur prune` tells who finds its folder: the model card, true for the folder that it lies in."""

import json
import re

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.removal.checkpoint import without_hook
from secateur.report import pruning_files
from secateur.report.how_to_load import how_to_load
from secateur.report.model_card import hub_id_of, write_model_card
from tests.support.pruned import assert_equal
from tests.support.tiny import tiny_classifier, tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_folder(folder, model=None):
    (model or tiny_model("bert")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prune(folder, out, *options, texts=48):
    data = folder / "texts.csv"
    data.write_text("sentence\n" + "\n".join(tiny_texts(texts)) + "\n")
    arguments = ["prune", str(folder), "--data", str(data), "--no-maps", "--out", str(out), *options]
    assert cli.main(arguments) == 0
    return ModelCard.load(out / "README.md")


def load_as_told(card, folder):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names = {}
    exec(code.replace("FOLDER", str(folder)), names)
    return names["model"]


def test_a_folder_with_a_recipe_asks_for_secateur(tmp_path, capsys):
    dense = dense_folder(tmp_path / "my dense", tiny_classifier("bert"))
    card = prune(dense, tmp_path / "out", "--scorer", "magnitude", "--restore", "none")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert card.data.tags == ["secateur", "pruned"]
    assert "base_model" not in card.data.to_dict()  # a folder of this machine
    assert str(tmp_path) not in card.content
    assert "# my dense, pruned" in card.text
    assert "import secateur  # first" in card.text
    assert "Never set `ignore_mismatched_sizes=True`" in card.text
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    heads, macs = [(report["before"][name], report["after"][name]) for name in ("heads", "macs")]
    assert f"| heads | {heads[0]} | {heads[1]} | 50.0% |" in card.text
    assert f"| {macs[0]:,} | {macs[1]:,} | {macs[1] / macs[0]:.1%} |" in card.text
    assert f"differ by at most {report['max_difference']:.1e}" in card.text
    assert "Quality: not measured" in card.text
    assert "chosen by `magnitude`, given 48 texts" in card.text
    model = load_as_told(card, tmp_path / "out")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert_equal(AutoModel.from_pretrained(tmp_path / "out"), model.base_model)
    assert "Never set <code>ignore_mismatched_sizes=True</code>" in (tmp_path / "out" / "report.html").read_text()


def test_a_plain_folder_asks_for_nothing(tmp_path, capsys):
    options = ("--budget", "layers=0.7", "--plain", "--steps", "2", "--restore", "distill")
    card = prune(dense_folder(tmp_path / "dense"), tmp_path / "out", *options)
    assert "import secateur" not in card.content.lower()
    assert "ignore_mismatched_sizes" not in card.text
    assert "loads where secateur is not installed" in card.text
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert f"relational KL {report['quality']['relational_kl']:.4f}" in card.text
    assert f"({report['quality']['num_texts']} texts held out)" in card.text
    assert "Budget: layers 0.667" in card.text
    assert "Distillation: relational KL on texts held out" in card.text
    assert "Nothing else is needed" in (tmp_path / "out" / "report.html").read_text()
    with without_hook():
        model = load_as_told(card, tmp_path / "out")
    assert_equal(model, AutoModel.from_pretrained(tmp_path / "out"))
    assert model.config.num_hidden_layers == 2


def test_a_card_from_elsewhere_stays(tmp_path, capsys, monkeypatch):
    def put_beside(report, folder):
        (folder / "README.md").write_text("theirs")
        assert write_model_card(report, folder).name == "PRUNING.md"

    monkeypatch.setattr(pruning_files, "write_model_card", put_beside)
    dense, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    (dense / "texts.csv").write_text("sentence\n" + "\n".join(tiny_texts(8)) + "\n")
    given = ["prune", str(dense), "--data", str(dense / "texts.csv"), "--scorer", "magnitude", "--out", str(out)]
    assert cli.main(given) == 0
    assert (out / "README.md").read_text() == "theirs"
    assert "## How to load it" in ModelCard.load(out / "PRUNING.md").text


def test_a_folder_without_a_model_has_no_card(tmp_path):
    with pytest.raises(InvalidInputError, match="`folder` must hold a model"):
        write_model_card(None, tmp_path)


@pytest.mark.parametrize("named", [3, [], [3], ["Own"], ["x; import os"], {"a": 1}, None])
def test_a_class_that_transformers_has_not_is_not_named(named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": named}))
    lines = ["from transformers import AutoModel", "", 'model = AutoModel.from_pretrained("FOLDER")']
    assert how_to_load(tmp_path) == {"code": "\n".join(lines), "needs_secateur": False, "library": "transformers"}
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": named}))
    assert how_to_load(tmp_path)["code"].endswith('model = SentenceTransformer("FOLDER")')


def test_the_base_model_is_an_id_or_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    dense_folder(cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert hub_id_of("someone/small") == "someone/small"
    assert hub_id_of("someone/else") is None
    assert hub_id_of(tmp_path / "nowhere") is None
    twice = dense_folder(tmp_path / "pruned" / "twice")
    for named, found in (("someone/small", "someone/small"), (str(twice), None), ("gone/away", None)):
        config = json.loads((twice / "config.json").read_text())
        (twice / "config.json").write_text(json.dumps({**config, "pruned_from": {"base_model": named}}))
        assert hub_id_of(twice) == found
        assert hub_id_of("pruned/twice") == found
