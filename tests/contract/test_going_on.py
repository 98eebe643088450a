"""A pruning that was stopped goes on where it was, and ends as it would have in one go."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from secateur import cli
from secateur.finetuning import trainer, training_checkpoints
from secateur.pruning_work import Pruning
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6


@pytest.fixture
def line(tmp_path, monkeypatch):
    """`line(out)` is a command that scores, measures, refits and teaches, and keeps every step of that."""
    monkeypatch.setattr(training_checkpoints, "SECONDS", 0.0)
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("\n".join(["sentence", *tiny_texts(60)]) + "\n")
    words = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "texts.csv"), "--budget", "macs=0.7"]
    words += ["--steps", str(STEPS), "--device", "cpu", "--batch-size", "8"]
    return lambda out, *more: [*words, *more, "--out", str(tmp_path / out)]


class Stop(TrainerCallback):
    """Ctrl-C after some steps."""

    def __init__(self, after):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.after:
            raise KeyboardInterrupt


def results(folder):
    report = json.loads((folder / "pruning_report.json").read_text())
    for name in ("created", "command", "scoring_seconds"):
        report.pop(name)
    return load_file(folder / "model.safetensors"), report


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    assert one[1] == other[1]


@pytest.mark.parametrize(
    ("place", "budget"),
    [("refit", "macs=0.7"), ("removal", "similarity=0.9"), ("training", "macs=0.7")],
)
def test_a_stopped_pruning_ends_as_one_in_one_go(place, budget, line, tmp_path, monkeypatch, capsys):
    assert cli.main(line("whole", "--budget", budget)) == 0
    with monkeypatch.context() as stopped:
        if place == "training":
            stopped.setattr(
                trainer.ResumedTrainer, "__init__", _with(trainer.ResumedTrainer.__init__, Stop(STEPS // 2))
            )
        else:
            name = {"refit": "reconstruct", "removal": "remove"}[place]
            stopped.setattr(Pruning, name, _interrupted)
        assert cli.main(line("parts", "--budget", budget)) == 130
    hidden = tmp_path / ".parts.steps"
    assert hidden.is_dir()
    assert not (tmp_path / "parts").exists()
    capsys.readouterr()
    calls = []
    monkeypatch.setattr(Pruning, "score", lambda *_: calls.append("scored"))
    assert cli.main(line("parts", "--budget", budget)) == 0
    there = {"refit": "mask", "removal": "mask, refit", "training": "mask, refit, training"}[place]
    assert f"secateur: going on with the {there} of a run that was stopped" in capsys.readouterr().err
    assert calls == []
    assert not hidden.exists()
    assert_same(results(tmp_path / "parts"), results(tmp_path / "whole"))


def _interrupted(*_):
    raise KeyboardInterrupt


def _with(init, callback):
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(callback)

    return wrapped


@pytest.mark.parametrize("change", ["options", "texts", "model"])
def test_steps_of_another_pruning_are_not_taken_up(change, line, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as stopped:
        stopped.setattr(Pruning, "remove", _interrupted)
        assert cli.main(line("out")) == 130
    capsys.readouterr()
    more = ["--seed", "1"] if change == "options" else []
    if change == "texts":
        (tmp_path / "texts.csv").write_text("\n".join(["sentence", *tiny_texts(60, seed=1)]) + "\n")
    if change == "model":
        model = tiny_model("bert")
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        model.save_pretrained(tmp_path / "model")
    assert cli.main(line("out", *more)) == 0
    assert "going on" not in capsys.readouterr().err
    assert cli.main(line("fresh", *more)) == 0
    assert_same(results(tmp_path / "out"), results(tmp_path / "fresh"))


def test_an_error_leaves_no_steps(line, tmp_path, monkeypatch):
    monkeypatch.setattr(Pruning, "remove", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(line("out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "texts.csv"]


@pytest.mark.parametrize("name", ["weights.pt", "optimizer.pt"])
def test_a_damaged_checkpoint_is_one_line_and_the_next_run_begins_anew(name, line, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as stopped:
        stopped.setattr(trainer.ResumedTrainer, "__init__", _with(trainer.ResumedTrainer.__init__, Stop(STEPS // 2)))
        assert cli.main(line("out")) == 130
    (file,) = (tmp_path / ".out.steps").rglob(name)
    file.write_bytes(file.read_bytes()[:-40])
    capsys.readouterr()
    assert cli.main(line("out")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("secateur: error: ")
    assert "is damaged: " in said
    assert said.endswith("the same call begins anew")
    assert not (tmp_path / ".out.steps").exists()


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    for step, is_whole in ((2, True), (10, True), (12, False)):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if is_whole:
            (place / "whole").touch()
    assert training_checkpoints.newest(tmp_path) == tmp_path / "checkpoint-10"
    assert training_checkpoints.newest(tmp_path / "nothing") is None


def test_a_disk_that_takes_no_checkpoint_stops_nothing(line, tmp_path, monkeypatch, capsys):
    def full(self, *_):
        (tmp_path / ".out.steps" / "training" / "checkpoint-1").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_checkpoints.Trainer, "_save_checkpoint", full)
    assert cli.main(line("out")) == 0
    said = "secateur: no checkpoint of the training was written: [Errno 28] No space left on device"
    assert capsys.readouterr().err.count(said) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_how_often_checkpoints_come():
    now = [0.0]
    keeping = training_checkpoints.Keeping(lambda: now[0])

    def asked(seconds):
        now[0], control = seconds, nn.Module()
        control.should_save = False
        keeping.on_step_end(None, None, control)
        return control.should_save

    assert [asked(59), asked(60), asked(61)] == [False, True, True]
