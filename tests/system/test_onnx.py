"""`secateur export --format onnx`: the graph gives what PyTorch gives, or there is no graph."""

import errno
import json
import shutil
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import cli
from secateur.errors import InvalidInputError
from secateur.exporting import int8, latency
from secateur.exporting import onnx as onnx_export
from secateur.exporting.export import export_onnx
from secateur.measuring.onnx_graph import graphs_in
from secateur.models.inputs import example_inputs
from secateur.models.loading import load_model
from secateur.removal.remove import remove_
from secateur.settings import Shape
from secateur.sites.attention import find_sites
from secateur.sites.finding import find_units
from secateur.units.masks import Mask
from tests.support.tiny import CONFIGS, tiny_model, uneven_mask


def run(folder, inputs):
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: numpy.asarray(value) for name, value in inputs.items()})


def test_a_pruned_classifier_with_an_emptied_site(onnx_classifier):

    graph = onnx.load(onnx_classifier / "onnx" / "onnx" / "model.onnx", load_external_data=False)
    assert graph.opset_import[0].version == 20
    assert [i.name for i in graph.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    axes = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.graph.input]
    assert axes == [["batch", "sequence"]] * 3
    results = [d.dim_param or d.dim_value for d in graph.graph.output[0].type.tensor_type.shape.dim]
    assert results == ["batch", 3]
    # The weights are the pruned ones: layer 0 keeps three of four heads.
    assert [24, 32] in [list(i.dims) for i in graph.graph.initializer] or [32, 24] in [
        list(i.dims) for i in graph.graph.initializer
    ]
    tokenizer = AutoTokenizer.from_pretrained(onnx_classifier / "onnx")
    model = load_model(onnx_classifier / "pruned", "cpu")
    # Padding may not change a text's result: alone, and among longer ones.
    texts = ["good film", "bad plot story end start red blue music scene actor", "music"]
    together = dict(tokenizer(texts, padding=True, return_tensors="np"), token_type_ids=None)
    together["token_type_ids"] = numpy.zeros_like(together["input_ids"])
    (logits,) = run(onnx_classifier / "onnx", together)
    with torch.no_grad():
        wanted = model(**{name: torch.as_tensor(value) for name, value in together.items()}).logits
    numpy.testing.assert_allclose(logits, wanted.numpy(), atol=1e-5)
    alone = {name: value[:1, :4] for name, value in together.items()}
    numpy.testing.assert_allclose(run(onnx_classifier / "onnx", alone)[0], logits[:1], atol=1e-5)


def test_a_decoder_gives_logits_without_a_cache(tmp_path, capsys):
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config).eval()
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "pruned")
    capsys.readouterr()
    code = cli.main(["export", str(tmp_path / "pruned"), "--format", "onnx", "--out", str(tmp_path / "onnx"), "--json"])
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["outputs"] == ["logits"]
    assert result["inputs"] == ["input_ids", "attention_mask"]
    assert result["max_difference"] <= 1e-4


def test_weights_that_are_not_there_are_not_exported(onnx_classifier, tmp_path, capsys):
    shutil.copytree(onnx_classifier / "pruned", tmp_path / "half")
    path = tmp_path / "half" / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.weight"]
    save_file(tensors, path, {"format": "pt"})
    for form in ("onnx", "standalone"):
        assert cli.main(["export", str(tmp_path / "half"), "--format", form, "--out", str(tmp_path / form)]) == 2
        assert "lacks weights of BertForSequenceClassification, such as classifier.weight" in capsys.readouterr().err
        assert not (tmp_path / form).exists()


def test_a_graph_that_differs_is_an_error_and_leaves_nothing(onnx_classifier, tmp_path, monkeypatch, capsys):
    """Another model's graph in place of the one asked for."""
    model = load_model(onnx_classifier / "pruned", "cpu")
    with torch.no_grad():
        model.classifier.bias += 0.01
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(
        onnx_export, "_export", lambda *args: shutil.copytree(onnx_classifier / "onnx", args[-1], dirs_exist_ok=True)
    )
    capsys.readouterr()
    code = cli.main(["export", str(tmp_path / "other"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    assert code == 2
    assert "differs from PyTorch by 0.01 (at most 0.0001 is accepted)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_int8_beside_it_answers_alike_or_there_is_neither(onnx_classifier, tmp_path, monkeypatch, capsys):
    """Also with a site whose weights are all 0, which leaves nothing to scale."""
    finished = onnx_classifier / "onnx"
    monkeypatch.setattr(onnx_export, "_export", lambda *args: shutil.copytree(finished, args[-1], dirs_exist_ok=True))
    monkeypatch.setattr(int8, "ROUNDS", 1)
    found = export_onnx(onnx_classifier / "pruned", tmp_path / "graph", "int8")["int8"]
    assert 0.95 < found["cosine"] < 1 - 1e-9
    assert found["bytes"] == (tmp_path / "graph" / "onnx" / "model_qint8.onnx").stat().st_size < found["float_bytes"]
    kinds = {node.op_type for node in onnx.load(tmp_path / "graph" / "onnx" / "model_qint8.onnx").graph.node}
    assert "DynamicQuantizeLinear" in kinds

    # Without a tokenizer, and where one file would be too large for protobuf.
    monkeypatch.setattr(int8, "_LARGEST_FILE", 0)
    beside = int8.save_int8(load_model(onnx_classifier / "pruned", "cpu"), tmp_path / "graph", None)
    assert 0.95 < beside["cosine"] < 1 - 1e-9
    assert beside["bytes"] > (tmp_path / "graph" / "onnx" / "model_qint8.onnx").stat().st_size
    # A score alone has no direction: those of a batch are one row.
    assert int8._rows(torch.tensor([[1.0], [-2.0]]), torch.ones(2, 3)).shape == (1, 2)

    def negated(folder):
        graph = onnx.load(folder / "onnx" / "model.onnx")
        last = next(node for node in graph.graph.node if "logits" in node.output)
        last.output[:] = ["before"]
        graph.graph.node.append(onnx.helper.make_node("Neg", ["before"], ["logits"]))
        onnx.save(graph, folder / "onnx" / "model_qint8.onnx")

    monkeypatch.setattr(int8, "quantize_graph", negated)
    command = ["export", str(onnx_classifier / "pruned"), "--quantize", "int8", "--out", str(tmp_path / "other")]
    assert cli.main([*command, "--format", "onnx"]) == 2
    assert "a mean cosine of -1.000 to PyTorch (at least 0.95 is accepted)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
    assert cli.main([*command, "--format", "standalone"]) == 2
    assert "`--quantize` needs `--format onnx`" in capsys.readouterr().err
    with pytest.raises(InvalidInputError, match=r"`quantize` must be None or 'int8', got 'int4'"):
        export_onnx(onnx_classifier / "pruned", tmp_path / "other", "int4")


def test_a_graph_is_measured_beside_the_model_that_it_was_made_of(onnx_classifier, tmp_path, capsys):
    folders = [str(onnx_classifier / name) for name in ("pruned", "onnx")]
    assert cli.main(["bench", *folders, "--shape", "2x8", "--rounds", "1", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["pruned", "onnx (ONNX)"]
    assert found["rows"][0]["macs"] == found["rows"][1]["macs"]
    assert found["rows"][1]["peak_bytes"] is None
    assert graphs_in(onnx_classifier / "onnx").keys() == {"ONNX"}
    both = tmp_path / "both"
    shutil.copytree(onnx_classifier / "pruned", both)
    shutil.copytree(onnx_classifier / "onnx" / "onnx", both / "onnx")
    assert graphs_in(both) == {}  # PyTorch's weights are the model
    assert found["weight_bytes"]["onnx (ONNX)"] >= (onnx_classifier / "onnx" / "onnx" / "model.onnx").stat().st_size
    assert cli.main(["bench", *folders, "--shape", "2x8", "--train"]) == 2
    assert "`train` must be left out where a model is an ONNX graph" in capsys.readouterr().err


def test_a_damaged_graph_is_one_line(onnx_classifier, tmp_path, capsys):
    whole, file = (onnx_classifier / "onnx" / "onnx" / "model.onnx").read_bytes(), tmp_path / "onnx" / "model.onnx"
    file.parent.mkdir()
    shutil.copy(onnx_classifier / "onnx" / "config.json", tmp_path)
    pixels, out = (onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("pixels", "out"))
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["pixels"], ["out"])], "one", [pixels], [out])
    other = onnx.helper.make_model(other, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    said_of = {whole[:-500]: "is no graph", b"graph": "is no graph", other.SerializeToString(): "does not run on 1 x 8"}
    for content, said in said_of.items():
        file.write_bytes(content)
        assert cli.main(["bench", str(tmp_path), "--shape", "1x8", "--rounds", "1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("secateur: error: ")
        assert f"model.onnx {said}" in line
    wrong = {"hidden_size": "x"}, {"num_hidden_layers": 10**30}
    for values, said in zip(
        wrong, ("config.json describes no model: ", "in the config must be at most 10000"), strict=True
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **values}))
        assert cli.main(["bench", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


def test_what_units_cost_in_onnx_runtime(onnx_classifier, monkeypatch):
    """Every model that is timed has been exported; here all of them are the same graph, which takes no time to make."""
    model, shapes = load_model(onnx_classifier / "pruned", "cpu"), []

    def save(smaller, folder):
        shapes.append(sum(p.numel() for p in smaller.parameters()))
        shutil.copytree(onnx_classifier / "onnx" / "onnx", folder / "onnx")

    monkeypatch.setattr(latency, "save_onnx", save)
    table = latency.latency_table(model, Shape(2, 8), "onnx", rounds=1)
    assert table.runtime == "onnx"
    assert len(shapes) == 1 + sum(len(kind.levels) - 1 for kind in table.kinds)
    assert shapes[0] == max(shapes) > min(shapes)
    assert latency.latency_table(model, Shape(2, 8), rounds=1).runtime == "pytorch"


@pytest.mark.parametrize("said", ["errno 28", "os error 28", "4096 requested and 512 written"])
def test_a_full_disk_is_called_one(said, onnx_classifier, tmp_path, monkeypatch, capsys):
    """The exporter's packages write in Python, in Rust and by numpy, and wrap what they meet."""

    def export(*_):
        try:
            raise OSError(errno.ENOSPC, "full") if said == "errno 28" else RuntimeError(said)
        except Exception as error:
            raise ValueError("no export") from error

    monkeypatch.setattr(onnx_export, "_export", export)
    capsys.readouterr()
    code = cli.main(["export", str(onnx_classifier / "pruned"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert f"{tmp_path}/onnx cannot be written: " in said
    assert said.endswith("; nothing half-written is left; make room there, or choose another disk\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_what_is_no_text_encoder_or_decoder_is_refused(kind, tmp_path, capsys):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code = cli.main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "is neither a text encoder nor a decoder" in error


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    capsys.readouterr()
    code = cli.main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    error = capsys.readouterr().err
    assert code == 2
    assert "pip install 'secateur[onnx]'" in error


@pytest.mark.parametrize("kind", ["bert", "phi3"])
def test_a_block_without_neurons_has_a_silent_one(kind):
    """ONNX Runtime takes a size of 0 for another one."""
    model = tiny_model(kind)
    sites = find_units(model, ["neurons"])
    remove_(model, Mask({name: torch.full((site.num_units,), "1" not in name) for name, site in sites.items()}))
    filled = onnx_export.prepared(model)
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.allclose(filled(**inputs)[0], model(**inputs)[0], atol=1e-5)
    assert all(parameter.numel() for parameter in filled.parameters())
    assert not all(parameter.numel() for parameter in model.parameters())
