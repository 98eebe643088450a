"""The blocks of docs/deployment.md, run as they stand in one folder."""

import re
import shlex
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModel

from secateur import cli
from tests.support.legacy import v4_folder
from tests.support.pruned import pruned_classifier
from tests.support.tiny import CONFIGS, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # those of the packages on the page
def test_the_graph_of_an_encoder_runs_by_the_same_block(tmp_path, monkeypatch):
    """What comes out is the mean of the states of each text's own tokens, as sentence-transformers takes it."""
    monkeypatch.chdir(tmp_path)
    config = CONFIGS["bert"]()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    model, tokenizer = AutoModel.from_config(config).eval(), tiny_tokenizer()
    model.save_pretrained("small")
    tokenizer.save_pretrained("small")
    (block,) = re.findall(r"```python\n(import onnxruntime\n.*?)```", PAGE, flags=re.DOTALL)
    assert cli.main(["export", "small", "--format", "onnx", "--out", "graph"]) == 0
    names = {"tokenizer": tokenizer}
    exec(block, names)
    for text, row in zip(("good film", "bad"), names["result"], strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        numpy.testing.assert_allclose(row, states.mean(dim=1)[0].numpy(), atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # those of the packages on the page
def test_blocks_run(onnx_classifier, remote_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned_classifier().save_pretrained("small")
    tiny_tokenizer().save_pretrained("small")
    shutil.copytree(onnx_classifier / "onnx", "graph")  # of a model like it, by the page's own command
    v4_folder(tmp_path / "OLD", {0: [1]})
    names = {}
    blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") == 5
    ran = []
    for kind, block in blocks:
        if kind == "python":
            exec(block, names)
        for line in block.splitlines() if kind == "sh" else ():
            words = shlex.split(line)
            if words[0] == "secateur" and "graph" not in words:
                assert cli.main(words[1:]) == 0, line
                ran.append(words[1])
    assert ran == ["export", "convert"]
    assert names["result"].shape == (2, 3)
    assert names["embeddings"].shape == (1, 32)
    assert type(names["merged"]).__name__ == type(names["half"]).__name__ == "BertForSequenceClassification"
    assert (tmp_path / "new" / "config.json").is_file()
