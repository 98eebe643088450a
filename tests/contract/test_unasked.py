"""What a pruning by a ratio does unasked: it refits what stays, and says what it leaves out and why."""

import json

import pytest
import torch

import secateur
from secateur.cli import main
from secateur.errors import InvalidInputError
from secateur.report.reading import read_runs
from secateur.settings import Reading
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(40)
READING = Reading(batch_size=8, max_length=16, device="cpu")


def pruned(texts=TEXTS, reading=READING, **given):
    return secateur.prune(tiny_model("bert"), texts, 0.5, tokenizer=tiny_tokenizer(), reading=reading, **given)


def test_a_ratio_reconstructs_unless_told_otherwise():
    (smaller, report), (same, asked) = pruned(), pruned(restore="reconstruct")
    assert len(report.reconstruction) == 2
    assert report.reconstruction == asked.reconstruction
    assert (report.distillation, report.quality, report.left_out) == ((), None, ())
    assert all(torch.equal(one, other) for one, other in zip(smaller.parameters(), same.parameters(), strict=True))
    assert pruned(restore="none")[1].reconstruction == ()
    assert pruned(None, scorer="magnitude")[1].left_out == ()


def test_it_refits_on_few_of_many_texts(monkeypatch):
    fitted = []
    monkeypatch.setattr("secateur.pruning_work.SCORED_TEXTS", 16)
    monkeypatch.setattr("secateur.pruning_work.reconstruct_", lambda *args, **_: fitted.extend(args[2]) or (1.0, 1.0))
    pruned()
    assert fitted == TEXTS[::3]


def test_what_nobody_asked_for_stops_nothing():
    one_by_one = Reading(batch_size=1, max_length=16, device="cpu")
    _, report = pruned(reading=one_by_one, scorer="contribution")
    assert report.reconstruction == ()
    assert report.left_out == (
        "not reconstructed: `texts` must be at least 3 a batch, as the relations between them count, got 1; "
        "give more texts, or larger batches",
    )
    with pytest.raises(InvalidInputError, match="at least 3 a batch"):
        pruned(reading=one_by_one, scorer="contribution", restore="reconstruct")
    few = Reading(batch_size=8, max_length=16, device="cpu", stop=5)
    assert pruned(reading=few)[1].left_out == ("not reconstructed: 5 texts, 6 are needed",)


def test_the_command_says_what_it_leaves_out(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *TEXTS[:12]]))
    words = ["prune", tmp_path / "model", "--data", tmp_path / "texts.csv", "--max-length", 16, "--device", "cpu"]
    assert main([*map(str, words), "--restore", "distill", "--out", str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    assert "\nnot distilled: 12 texts, 21 are needed\n" in out
    assert "relational KL on these texts" in out
    report = json.loads((tmp_path / "small" / "pruning_report.json").read_text())
    assert report["left_out"] == ["not distilled: 12 texts, 21 are needed"]
    assert len(report["reconstruction"]) == 2
    assert "Not distilled: 12 texts, 21 are needed." in (tmp_path / "small" / "report.html").read_text()
    (tmp_path / "small" / "pruning_report.json").write_text(json.dumps(report | {"left_out": [1]}))
    with pytest.raises(InvalidInputError, match="`left_out` must be a list of lines"):
        read_runs([tmp_path / "small"])
