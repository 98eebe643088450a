"""The hour of use notices what is left behind."""

import random
import time

import pytest
import torch
from benchmarks import soak

FEW = [("score", soak._score), ("save and load", soak._save_and_load)]


@pytest.fixture
def hour(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "STOPPED", 0)
    monkeypatch.setattr(soak, "_given", lambda place: place)
    return soak.Soak(tmp_path, random.Random(0))


def test_use_that_leaves_nothing(hour, monkeypatch):
    monkeypatch.setattr(soak, "CALLS", FEW)
    hour.switches = soak.switches()  # pytest has changed the environment since
    for _ in range(3):
        hour.call()
    assert sum(hour.tried.values()) == 3
    assert hour.left == []


def forgotten_hook(one):
    next(one.model.children()).register_forward_hook(lambda *_: None)


def another_mode(one):
    one.model.train()


def half_a_folder(one):
    (one.results / "half").mkdir()
    (one.results / "half" / "config.json").write_text('{"model_type": "bert"')


def lost_file(one):
    (one.temporary / "lost").touch()


def hidden_file(one):
    (one.results / ".hidden").touch()


def no_gradients(one):
    torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (forgotten_hook, "hooks"), (another_mode, "mode changed"), (half_a_folder, "half is not whole"),
        (lost_file, r"\['lost'\] in the folder of temporary files"), (hidden_file, ".hidden lies about"),
        (no_gradients, "gradients changed"),
    ],
)  # fmt: skip
def test_what_is_left_behind_is_named(does, said, hour, monkeypatch):
    monkeypatch.setattr(soak, "CALLS", [("leave", does)])
    hour.switches = soak.switches()
    try:
        with pytest.raises(soak.Left, match=f"leave, done: .*{said}"):
            hour.call()
    finally:
        torch.set_grad_enabled(True)


def test_what_grows_is_named_and_what_fills_caches_is_not():
    rows = [
        {"memory_mib": 500 + min(n, 10) * 20, "files": 5, "threads": 2, "objects": 1000 + 10 * n} for n in range(40)
    ]
    assert soak.growing(rows) == ["objects grow: 1145.0 in the second quarter, 1345.0 in the last"]
    assert soak.growing(rows[:2]) == []


@pytest.mark.usefixtures("heard")
def test_ctrl_c_comes_after_a_while_or_not_at_all():
    with soak.stopped_after(0):
        pass
    with pytest.raises(KeyboardInterrupt), soak.stopped_after(0.01):
        wait()


def wait():
    """In plain code: Python drops a Ctrl-C that comes in a destructor."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        pass
