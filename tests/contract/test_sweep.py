"""The sweep's own checks, on a handful of model types, and that they can fail."""

import json
import re

import pytest
import torch
import transformers
from benchmarks import sweep
from benchmarks.other_units import check_neurons
from transformers import AutoModel

from secateur.sites import gating as probe
from secateur.sites import layout
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    "model_type",
    ["bert", "clip", "whisper", "videomae", "mpnet", "switch_transformers", "gpt_oss", "groupvit", "bridgetower"],
)
def test_types_that_come_through(model_type):
    result = sweep.check_type(model_type)
    assert result["outcome"] == "reloaded", result
    assert result["sites"] > 0
    assert result["parameters_after"] < result["parameters"]


@pytest.mark.parametrize(
    ("model_type", "outcome", "reason"),
    [
        ("fnet", "refused", "FNetModel has no attention whose heads can be told apart"),
        ("olmo2", "captured", "no weight of its query projection belongs to single heads"),
        ("bitnet", "captured", "no linear layer reads the heads side by side"),
        ("big_bird", "captured", "load it with `attention_type='original_full'`"),
        ("codegen", "gated", "CodeGenModel does not run with fewer units at site h.0.attn"),
        ("deepseek_v4", "captured", "does not keep heads apart"),
    ],
)
def test_types_that_are_refused_with_a_reason(model_type, outcome, reason):
    if model_type not in sweep.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    result = sweep.check_type(model_type)
    assert result["outcome"] == outcome, result
    assert reason in result["reason"]
    assert "raw" not in result


@pytest.mark.parametrize("model_type", ["altclip", "swinv2", "gemma4"])
def test_types_whose_neurons_come_through(model_type):
    if model_type not in sweep.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    result = check_neurons(sweep.build(model_type), "")
    assert (result["outcome"], result["share"], result["refused"]) == ("reloaded", 1, {})


@pytest.mark.parametrize("model_type", ["perceiver", "decision_transformer"])
def test_types_that_are_given_their_inputs(model_type):
    result = sweep.check_type(model_type)
    assert (result["outcome"], result["inputs"]) == ("reloaded", "given"), result
    others = sweep.check_other_units(model_type)
    assert (others["neurons"]["outcome"], others["layers"]["outcome"]) == ("reloaded", "reloaded")
    assert others["neurons"]["share"] == 1


def test_a_wrong_gate_is_noticed(monkeypatch):
    honest = probe._pass

    def crooked(entry, reading):
        outputs = honest(entry, reading)
        return outputs.roll(1, dims=2) if entry.gates else outputs

    monkeypatch.setattr(probe, "_pass", crooked)
    result = sweep.check_type("bert")
    assert (result["outcome"], result["stage"]) == ("WRONG", "gated")


def test_a_wrong_reading_is_noticed(monkeypatch):
    honest = probe._pass
    monkeypatch.setattr(probe, "_pass", lambda entry, reading: honest(entry, reading) * 1.01)
    result = sweep.check_type("bert")
    assert (result["outcome"], result["stage"]) == ("WRONG", "captured")


def test_a_wrong_removal_is_noticed_though_the_proof_is_blind(monkeypatch):
    from secateur.removal import proof

    honest = layout.AttentionSite.kept_indices

    def crooked(self, kept):
        return {key: (idx + 1) % 32 if "value.weight" in key[0] else idx for key, idx in honest(self, kept).items()}

    monkeypatch.setattr(layout.AttentionSite, "kept_indices", crooked)
    monkeypatch.setattr(proof, "largest_difference", lambda one, other: 0.0)
    result = sweep.check_type("bert")
    assert (result["outcome"], result["stage"]) == ("WRONG", "removed")


def test_a_wrong_reload_is_noticed(monkeypatch):
    honest = AutoModel.from_pretrained

    def crooked(*args, **kwargs):
        model = honest(*args, **kwargs)
        if hasattr(model.config, "head_pruning"):
            model.encoder.layer[0].attention.self.value.bias.data[0] += 1e-6
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", crooked)
    result = sweep.check_type("bert")
    assert (result["outcome"], result["stage"]) == ("WRONG", "reloaded")


def test_a_type_that_hangs_or_dies_does_not_stop_the_sweep():
    def hang(model_type):
        while True:
            pass

    def die(model_type):
        import os

        os._exit(9)

    assert "no answer within" in sweep.in_child(hang, "x", 0.5)["reason"]
    assert "ended without an answer" in sweep.in_child(die, "x", 20)["reason"]


def test_differences():
    one = torch.tensor([1.0, 2.0])
    assert sweep.difference([one], [one + 1]) == pytest.approx(0.5)
    assert sweep.difference([one], [one * float("nan")]) == float("inf")
    assert sweep.difference([one], [one[:1]]) == float("inf")
    assert len(sweep.tensors(tiny_model("bert")(torch.tensor([[5]])))) == 2


def test_the_page_says_what_the_results_say():
    root = sweep.ROOT
    report = json.loads((root / "benchmarks" / "results" / "sweep.json").read_text())
    assert (root / "docs" / "coverage.md").read_text() == sweep.page(report)
    assert "WRONG" not in report["counts"]
    captured = sum(bool(row.get("sites")) for row in report["types"])
    readme = " ".join((root / "README.md").read_text().split())
    built = sum(row["outcome"] != "not built" for row in report["types"])
    assert f"Of transformers' {len(report['types'])} model types, {built} could be built tiny" in readme
    assert f"{captured} types had their heads" in readme
    assert f"{report['counts']['reloaded']} of them lost heads" in readme
    for kind in ("neurons", "layers"):
        (count,) = re.findall(rf"\| {kind} removed and reloaded exactly \| (\d+) \|", sweep.page(report))
        assert f"{count} lose {kind}" in readme
    assert not any(row.get("raw") and row["outcome"] == "gated" for row in report["types"])
