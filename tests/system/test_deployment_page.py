"""The blocks of docs/deployment.md, run as they stand in one folder."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModel

from secateur import cli
from secateur.finetuning.similarity import POOLINGS
from tests.support.legacy import v4_folder
from tests.support.pruned import pruned_classifier
from tests.support.tiny import CONFIGS, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")


def encoder(folder, **settings):
    """A tiny encoder of 16 positions and its tokenizer, saved."""
    config = CONFIGS["bert"]()
    config.update({"num_hidden_layers": 1, "max_position_embeddings": 16, **settings})
    torch.manual_seed(0)
    model, tokenizer = AutoModel.from_config(config).eval(), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # those of the packages on the page
def test_the_graph_of_an_encoder_runs_by_the_same_block(tmp_path, monkeypatch, capsys):
    """What comes out is the mean of the states of each text's own tokens, as sentence-transformers takes it.

    What a config asks for besides is no output of the graph, and no text is longer than the model takes.
    """
    monkeypatch.chdir(tmp_path)
    model, tokenizer = encoder("small", output_hidden_states=True, return_dict=False)
    (block,) = re.findall(r"```python\n(import onnxruntime\n.*?)```", PAGE, flags=re.DOTALL)
    assert cli.main(["export", "small", "--format", "onnx", "--out", "graph", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["outputs"] == ["last_hidden_state", "pooler_output"]
    assert result["max_difference"] <= 1e-4
    names = {"tokenizer": tokenizer}
    exec(block, names)
    for text, row in zip(("good film", "bad"), names["result"], strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"))[0]
        numpy.testing.assert_allclose(row, states.mean(dim=1)[0].numpy(), atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # those of the packages on the page
def test_int8_of_a_sentence_encoder_gives_embeddings(tmp_path, monkeypatch, capsys):
    """By the page's command and block, by all poolings at once; the files lie where sentence-transformers looks."""
    from sentence_transformers.backend.utils import backend_should_export

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.exporting.int8.ROUNDS", 1)
    model, tokenizer = encoder("small")
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"path": f"{i}_{kind}" if i else "", "type": f"models.{kind}"} for i, kind in enumerate(kinds)]
    Path("small/modules.json").write_text(json.dumps(modules))
    Path("small/1_Pooling").mkdir()
    Path("small/1_Pooling/config.json").write_text(json.dumps({"pooling_mode": list(POOLINGS)}))
    (command,) = re.findall(r"```sh\nsecateur (export .* --quantize int8 .*)\n```", PAGE)
    assert cli.main(shlex.split(command)) == 0
    assert re.search(
        r"int8: [\d.]+ MB of [\d.]+, [\d.]+ of the time.*\nmean cosine of int8 to PyTorch [01]\.\d{4}\n",
        capsys.readouterr().out,
    )
    (block,) = re.findall(r"```python\n(import numpy\n.*?)```", PAGE, flags=re.DOTALL)
    for file, tolerance in (("model_qint8.onnx", 0.02), ("model.onnx", 1e-5)):
        names = {}
        exec(block.replace("model_qint8.onnx", file), names)
        for text, row in zip(("good film", "bad"), names["embeddings"], strict=True):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            whole = torch.ones(*states.shape[:2], 1)
            wanted = torch.cat([pooling(states, whole) for pooling in POOLINGS.values()], dim=1)
            numpy.testing.assert_allclose(row, (wanted / wanted.norm())[0].numpy(), atol=tolerance)
    chosen = {"file_name": "onnx/model_qint8.onnx"}
    looked = backend_should_export(Path("graph"), True, chosen, "model.onnx", "*.onnx", "ONNX")
    assert looked == (False, {"subfolder": "onnx", "file_name": "model_qint8.onnx"})
    assert Path("graph/1_Pooling/config.json").is_file()


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
    assert [kind for kind, _ in blocks].count("python") == 6
    ran = []
    for kind, block in blocks:
        if kind == "python" and "qint8" not in block:
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
