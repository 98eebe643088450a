"""A standalone folder gives the same model where secateur is not there, and where it is."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    TimesformerConfig,
)
from transformers.dynamic_module_utils import get_relative_imports

import secateur
from secateur import cli
from secateur.exporting import standalone
from secateur.exporting.export import export_standalone
from secateur.models.inputs import example_inputs
from secateur.models.loading import load_model
from secateur.removal.checkpoint import without_hook
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from tests.support.bare import BARE
from tests.support.tiny import CONFIGS, tiny_classifier, tiny_model, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")


# Its code asks for the width of all heads, and is given another on the way.
TIMESFORMER = TimesformerConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=16, patch_size=8,
    num_frames=3,
)  # fmt: skip


def pruned(kind, auto=None, empty=False):
    if auto is None:
        model = tiny_classifier(kind)
    else:
        torch.manual_seed(0)
        model = auto.from_config(CONFIGS[kind]() if isinstance(kind, str) else kind).eval()
    remove_(model, uneven_mask(find_sites(model), empty))
    return model


MODELS = {
    "bert": lambda: pruned("bert"),
    "albert": lambda: pruned("albert"),
    "llama": lambda: pruned("llama", AutoModelForCausalLM),
    "gpt2": lambda: pruned("gpt2", AutoModelForCausalLM, empty=True),
    "t5": lambda: pruned("t5", AutoModelForSeq2SeqLM),
    "phi3": lambda: pruned("phi3", AutoModelForCausalLM),
    "bloom": lambda: pruned("bloom", AutoModelForCausalLM, empty=True),
    "timesformer": lambda: pruned(TIMESFORMER, AutoModel),
}


OWN = {
    "bert": "AutoModelForSequenceClassification",
    "albert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "minilm": "AutoModel",
    "timesformer": "AutoModel",
}


def run_bare(jobs, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", BARE, json.dumps(jobs)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.real
def test_without_secateur_the_outputs_are_the_same_bit_for_bit(minilm, tokenizer, tmp_path):
    remove_(minilm, uneven_mask(find_sites(minilm)))
    models = {"minilm": minilm} | {name: make() for name, make in MODELS.items()}
    jobs, expected = [], {}
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder / "pruned")
        result = export_standalone(folder / "pruned", folder / "alone")
        own = OWN.get(name, "AutoModelForCausalLM")
        assert {own, "AutoModel"} <= set(result["auto_classes"])
        inputs = {k: v for k, v in example_inputs(model).items() if isinstance(v, torch.Tensor)}
        torch.save(inputs, folder / "inputs.pt")
        autos = sorted({own, "AutoModel"}, reverse=True)
        jobs.append(
            {"folder": str(folder / "alone"), "autos": autos, "inputs": str(folder / "inputs.pt"),
             "outputs": str(folder / "outputs.pt")}
        )  # fmt: skip
        expected[name] = {}
        for auto in autos:
            loaded = getattr(transformers, auto).from_pretrained(folder / "pruned").eval()
            with torch.no_grad():
                expected[name][auto] = loaded(**inputs)[0]
            if auto == "AutoModelForCausalLM":
                expected[name]["generated"] = loaded.generate(
                    **inputs, max_new_tokens=3, do_sample=False, pad_token_id=0
                )
    run_bare(jobs, tmp_path)
    for name, outputs in expected.items():
        found = torch.load(tmp_path / name / "outputs.pt")
        assert found.keys() == {f"{key} {number}" for key in outputs for number in (0, 1)}
        for key, value in outputs.items():
            assert torch.equal(found[f"{key} 0"], value), (name, key)
            assert torch.equal(found[f"{key} 1"], value), (name, key, "saved again")


def test_with_secateur_the_folder_is_narrowed_once(remote_code, tmp_path):
    """With `trust_remote_code` both the folder's class and secateur's hook want to narrow; without, the hook alone."""
    model = pruned("bert")
    model.save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    inputs = example_inputs(model)
    with torch.no_grad():
        wanted = model(**inputs).logits
        for trust in (True, False):
            again = AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "alone", trust_remote_code=trust
            ).eval()
            assert (type(again).__module__.startswith("transformers_modules")) == trust
            assert torch.equal(again(**inputs).logits, wanted)
            assert [site.units for site in find_sites(again).values()] == [s.units for s in find_sites(model).values()]
    # With its own class, a copy saved again still carries the code; the class's name stayed that of transformers.
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "alone", trust_remote_code=True)
    remove_(loaded, secateur.Mask({"encoder.layer.1.attention.self": torch.tensor([True, False, True, True])}))
    loaded.save_pretrained(tmp_path / "twice")
    codes = [{file.name: file.read_text() for file in (tmp_path / n).glob("*.py")} for n in ("alone", "twice")]
    assert codes[0] == codes[1]
    config = json.loads((tmp_path / "twice" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["auto_map"]["AutoModel"] == "modeling_pruned.BertModel"
    # Loaded as one of transformers' own classes for a command, it must not name code that is not saved with it.
    assert not hasattr(load_model(tmp_path / "alone").config, "auto_map")


def test_a_model_built_by_the_folders_code_is_pickled(remote_code, tmp_path):
    pruned("mpnet").save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    with without_hook():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "alone", trust_remote_code=True).eval()
    mixed = type(model.base_model.encoder.layer[0].attention.attn).__mro__[1]
    assert mixed.__module__.startswith("transformers_modules")
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, model(**inputs).logits)


def test_the_code_needs_nothing_but_torch_and_transformers(tmp_path):
    pruned("bert").save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    files = sorted((tmp_path / "alone").glob("*.py"))
    assert [file.stem for file in files] == [
        "adapted", "base_model", "emptied", "errors", "feed_forward", "forward", "layers", "layout", "modeling_pruned",
        "moved", "narrowing", "packing", "recipe", "replay", "reshaped",
    ]  # fmt: skip
    for file in files:
        code = file.read_text()
        imported = set()
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert (tmp_path / "alone" / f"{node.module}.py") in files
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported - sys.stdlib_module_names <= {"torch", "transformers"}
        assert code.startswith("# SPDX-License-Identifier: Apache-2.0\n")
        assert f"secateur {secateur.__version__}" in code
    # transformers 5.0 copies what the first file names, and nothing that only others do.
    named = {f"{name}.py" for name in get_relative_imports(tmp_path / "alone" / "modeling_pruned.py")}
    assert named == {file.name for file in files} - {"modeling_pruned.py"}
    check = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", "--select=F,E"]
    assert subprocess.run([*check, tmp_path / "alone"], capture_output=True).returncode == 0


def test_a_classifier_of_another_kind_starts_from_the_folder(tmp_path):
    """Every Auto class of the model's kind is served, as long as it has the sites."""
    model = tiny_model("bart")
    remove_(model, uneven_mask(find_sites(model)))
    model.save_pretrained(tmp_path / "pruned")
    autos = export_standalone(tmp_path / "pruned", tmp_path / "alone")["auto_classes"]
    assert {"AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"} <= set(autos)
    assert "AutoModelForCausalLM" not in autos  # the decoder alone has no encoder sites


def test_half_precision_stays(tmp_path):
    model = pruned("bert").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    assert AutoModel.from_pretrained(tmp_path / "alone", dtype="auto").dtype == torch.bfloat16


def test_the_command(tmp_path, capsys):
    pruned("bert").save_pretrained(tmp_path / "pruned")
    tiny_tokenizer().save_pretrained(tmp_path / "pruned")
    out = tmp_path / "alone"
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "pruned"), "--format", "standalone", "--out", str(out)]) == 0
    assert "BertForSequenceClassification, reloaded bit for bit" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_pruned.py", "replay.py", "tokenizer.json"} <= names
    assert "__pycache__" not in names
    recipe = json.loads((out / "config.json").read_text())["head_pruning"]
    assert recipe["how_to_load"].startswith("from_pretrained with trust_remote_code=True")


def test_a_whole_model_is_refused(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "whole")
    capsys.readouterr()
    code = cli.main(["export", str(tmp_path / "whole"), "--format", "standalone", "--out", str(tmp_path / "alone")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "`model` must be pruned, got 'BertModel'; any other folder loads without secateur as it is" in error
    assert not (tmp_path / "alone").exists()


def test_code_that_does_not_rebuild_the_model_is_not_left_behind(tmp_path, monkeypatch, capsys):
    pruned("llama", AutoModelForCausalLM).save_pretrained(tmp_path / "pruned")
    flat = standalone._flat
    monkeypatch.setattr(
        standalone,
        "_flat",
        lambda module: {k: v.replace("    rebuild_(model)\n", "    return\n") for k, v in flat(module).items()},
    )
    code = cli.main(["export", str(tmp_path / "pruned"), "--format", "standalone", "--out", str(tmp_path / "alone")])
    assert code == 2
    assert "the standalone folder of LlamaForCausalLM does not load" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()


def test_the_code_is_that_of_the_package_but_for_where_it_imports_from(tmp_path):
    pruned("bert").save_pretrained(tmp_path / "pruned")
    export_standalone(tmp_path / "pruned", tmp_path / "alone")
    sources = {path.name: path for path in Path(secateur.__file__).parent.rglob("*.py")}
    for file in (tmp_path / "alone").glob("*.py"):
        if file.name != "modeling_pruned.py":
            ours, copied = sources[file.name].read_text().splitlines(), file.read_text().splitlines()
            differing = [line for line in ours if line not in copied]
            assert copied[2:] == [re.sub(r"from secateur\.\S*?(\w+) import", r"from .\1 import", line) for line in ours]
            assert all(line.startswith("from secateur.") for line in differing)
