"""Checkpoints and calls that transformers 4 understood."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from secateur.errors import CheckpointError
from secateur.models.inputs import example_inputs
from secateur.removal import legacy
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from tests.support.legacy import v4_folder
from tests.support.tiny import CONFIGS, tiny_model


def masked_by_hand(model, pruned):
    """Silence heads with zeros in the output projection."""
    for layer, heads in pruned.items():
        weight = model.encoder.layer[layer].attention.output.dense.weight
        for head in heads:
            weight.data[:, 8 * head : 8 * head + 8] = 0
    return model


@pytest.mark.parametrize("pruned", [{0: [1]}, {0: [0, 3], 2: [2]}])
def test_a_v4_checkpoint_loads_and_becomes_one_of_todays(pruned, tmp_path):
    v4_folder(tmp_path / "v4", pruned)
    model = AutoModel.from_pretrained(tmp_path / "v4").eval()
    inputs = example_inputs(model)
    for one, other in zip(
        hidden_states(model, inputs), hidden_states(masked_by_hand(tiny_model("bert"), pruned), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    on_disk = load_file(tmp_path / "v4" / "model.safetensors")
    assert all(torch.equal(value, on_disk[name]) for name, value in model.state_dict().items() if name in on_disk)
    model.save_pretrained(tmp_path / "today")
    config = json.loads((tmp_path / "today" / "config.json").read_text())
    assert "pruned_heads" not in config
    kept = config["head_pruning"]["kept_heads"]
    assert kept["encoder.layer.0.attention.self"] == [h for h in range(4) if h not in pruned[0]]
    again = AutoModel.from_pretrained(tmp_path / "today").eval()
    assert all(
        torch.equal(a, b) for a, b in zip(hidden_states(model, inputs), hidden_states(again, inputs), strict=True)
    )


def test_a_v4_gpt2_with_its_fused_weight(tmp_path):
    pruned, kept = [0, 2], [*range(8, 16), *range(24, 32)]
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fused = torch.tensor([32 * part + i for part in range(3) for i in kept])
    for name in ("c_attn.weight", "c_attn.bias"):
        tensors[f"h.1.attn.{name}"] = tensors[f"h.1.attn.{name}"].index_select(-1, fused).contiguous()
    tensors["h.1.attn.c_proj.weight"] = tensors["h.1.attn.c_proj.weight"][kept].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": {"1": pruned}}))
    with torch.no_grad():
        for head in pruned:
            model.h[1].attn.c_proj.weight[8 * head : 8 * head + 8] = 0
    again = AutoModel.from_pretrained(tmp_path).eval()
    inputs = example_inputs(model)
    for one, other in zip(hidden_states(again, inputs), hidden_states(model, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_v4_task_model_in_half_precision_is_pruned_further(tmp_path):
    torch.manual_seed(0)
    task = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    v4_folder(tmp_path, {1: [0]}, task)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    site = find_sites(model)["encoder.layer.1.attention.self"]
    assert site.units == (1, 2, 3)
    mask = {"encoder.layer.1.attention.self": torch.tensor([False, True, False, True])}
    assert remove_(model, Mask(mask)).mask.kept["encoder.layer.1.attention.self"] == [1, 3]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1, 2], r"must map layers to lists of heads, got \[1, 2\]"),
        ({"x": [1]}, "must map layers to lists of heads"),
        ({"0": ["a"]}, r"must be a list of head indices, got \['a'\]"),
        ({"7": [1]}, "names layer 7; BertModel has 3"),
        ({"0": [4]}, r"must be heads below 4, got \[4\]"),
        ({"0": [0, 1, 2, 3]}, "must leave a head in the layer, got all 4"),
    ],
)
def test_impossible_entries_are_refused(entry, message, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": entry}))
    with pytest.raises(CheckpointError, match=message):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["albert", "bart"])
def test_layers_that_are_no_sites_are_refused(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": {"0": [1]}}))
    with pytest.raises(CheckpointError, match="not its layers one to one"):
        AutoModel.from_pretrained(tmp_path)


def test_an_empty_entry_changes_nothing(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": {}}))
    assert not hasattr(AutoModel.from_pretrained(tmp_path).config, "head_pruning")


def test_head_mask_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(legacy, "_warned", False)
    model = tiny_model("bert")
    inputs = example_inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
        model(**inputs, head_mask=None)
        with pytest.raises(UserWarning, match="BertModel was called with `head_mask`, which transformers 5 ignores"):
            model(**inputs, head_mask=torch.zeros(3, 4))
        model(**inputs, head_mask=torch.zeros(3, 4))


def test_the_call_compiles_as_before():
    model = tiny_model("bert")
    inputs = example_inputs(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
