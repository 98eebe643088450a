"""`secateur reproduce`: the paper's experiment in one folder, stopped and gone on with."""

import json
from types import SimpleNamespace

import pytest
import torch

from secateur import cli
from secateur.comparing import compare as comparison
from secateur.comparing.plan import Settings
from secateur.meta_training.config import MetaTrainingConfig
from secateur.pruners.map_network import MetaPruner
from secateur.reproducing.forecast import comparison_seconds, meta_training_seconds
from secateur.reproducing.scales import SCALES, SCORERS
from secateur.scorers.score import score
from secateur.support.files import read_lines
from secateur.texts.data import load_task
from secateur.units.select import select
from tests.support.meta import subject
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The arguments of a tiny model, and of two tasks of it."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for task, pairs in (("singles", False), ("pairs", True)):
        (folder / task).mkdir()
        for split, seed in (("train", 0), ("dev", 1)):
            header = "sentence1\tsentence2\tlabel" if pairs else "sentence\tlabel"
            texts = tiny_texts(40, seed, pairs)
            lines = ["\t".join([*((t,) if isinstance(t, str) else t), str(int("good" in str(t)))]) for t in texts]
            (folder / task / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return ["--model", folder / "model", "--data", folder / "singles", "--data", folder / "pairs"]


def reproduce(capsys, out, *more, scale="tiny"):
    arguments = ["reproduce", "--scale", scale, "--device", "cpu", "--jobs", "1", "--out", out, *more]
    code = cli.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_a_stopped_reproduction_goes_on_to_its_table(given, tmp_path, capsys, monkeypatch):
    out, trained, inner = tmp_path / "r", [], comparison.train_run

    def interrupted(*arguments):
        if len(trained) == 3:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(arguments[1])
        return inner(*arguments)

    monkeypatch.setattr(comparison, "train_run", interrupted)
    code, _, err = reproduce(capsys, out, *given)
    assert code == 130
    assert "the same command goes on" in err
    assert "2 of 2 updates of 1 x 4 texts, signal straight_through, tasks singles, pairs; roughly" in err
    assert "8 of 8 runs, 1 at once, tasks singles, pairs; roughly" in err
    made = (out / "meta-training" / "pruner" / "model.safetensors").read_bytes()
    code, _, err = reproduce(capsys, out, *given, "--json")
    assert code == 0, err
    assert "0 of 2 updates" in err
    assert "5 of 8 runs" in err
    assert (out / "meta-training" / "pruner" / "model.safetensors").read_bytes() == made
    runs = [run for run in trained if run != "stopped"]
    assert len(runs) == len(set(runs)) == 8  # nothing was done twice

    # Smp's rows are masks of the pruner that was trained here.
    row = next(r for r in read_lines(out / "comparison" / "runs.jsonl") if (r["task"], r["scorer"]) == ("pairs", "smp"))
    texts = load_task(given[-1], "train").head(SCALES["tiny"].num_texts, seed=0).texts
    pruner = MetaPruner.from_pretrained(out / "meta-training" / "pruner")
    scores = score(tiny_model("bert"), texts, "smp", tiny_tokenizer(), pruner=pruner)
    assert row["kept_heads"] == select(scores, 0.5).kept
    result = json.loads((out / "results.json").read_text())
    assert {(r["task"], r["scorer"]) for r in result["rows"]} >= {
        (task, scorer) for task in ("singles", "pairs", "mean") for scorer in ("dense", *SCORERS)
    }
    assert result["meta_training"]["last"]["step"] == 2
    table = (out / "results.md").read_text()
    value = next(r["mean"] for r in result["rows"] if (r["task"], r["scorer"]) == ("pairs", "smp"))
    assert f"{value:.3f}" in next(line for line in table.splitlines() if line.startswith("| 50% | smp | "))
    assert "</html>" in (out / "report.html").read_text()


def test_a_given_pruner_takes_the_place_of_training(given, tmp_path, capsys, monkeypatch):
    authors = tmp_path / "base.bin"
    torch.save(MetaPruner().state_dict(), authors)
    code, text, err = reproduce(capsys, tmp_path / "r", *given[:4], "--pruner", authors)
    assert code == 0, err
    assert f"1. the pruner is {authors}" in err
    assert not (tmp_path / "r" / "meta-training").exists()
    assert "What the pruner learned" not in text

    # In a folder that is there only the same reproduction goes on.
    for out, more, message in (
        ("r", given[:4], "holds a reproduction with other pruner"),
        ("r", given, "holds a reproduction with other meta_tasks, tasks, pruner"),
        ("", given, "be a new folder, or one with a reproduction"),
        ("new", [*given[:2], "--data", tmp_path / "none"], "none"),
        ("new", [*given[:2], "--data", given[3] / "train.tsv"], "have train and dev apart"),
        ("new", [*given, "--pruner", tmp_path / "none"], "cannot be loaded as a MetaPruner"),
        ("new", ["--model", tmp_path / "none", *given[2:]], "none"),
    ):
        code, text, err = reproduce(capsys, tmp_path / out, *more)
        assert (code, text) == (2, ""), more
        assert message in err
        assert len(err.strip().splitlines()) == 1, err
    monkeypatch.setattr("secateur.reproducing.reproduce.Accelerator", lambda **_: SimpleNamespace(num_processes=2))
    code, _, err = reproduce(capsys, tmp_path / "new", *given)
    assert code == 2
    assert "runs in one process; start `meta-train` in several" in err
    assert not (tmp_path / "new").exists()


def test_every_scale_is_one_that_both_parts_take():
    assert MetaTrainingConfig(**SCALES["paper"].meta_training) == MetaTrainingConfig()
    for name, scale in SCALES.items():
        config = MetaTrainingConfig(**scale.meta_training)
        settings = Settings(
            "model", scale.tasks or ("demo",), SCORERS, seeds=scale.seeds, protocol=scale.protocol,
            num_texts=scale.num_texts, max_train=scale.max_train, epochs=scale.epochs,
            learning_rate=scale.learning_rate,
        )  # fmt: skip
        assert (config.pruning_ratio, settings.ratios) == (0.5, (0.5,)), name
        assert bool(scale.meta_tasks) == bool(scale.tasks), name


def test_the_forecast_by_hand():
    config = MetaTrainingConfig(steps=10, batch_size=4, batches_per_step=2)
    passes = {"a": 1.0, "b": 3.0}
    assert meta_training_seconds(subject(), passes, ["a", "b"], config, 5) == 2.0 * 4.5 * 5 * 8
    # With a pool, every one of the 12 heads of every batch once, and the dense model; then the pruner alone.
    pooled = MetaTrainingConfig(steps=10, batch_size=4, batches_per_step=2, signal="leave_one_out", pool=3)
    assert meta_training_seconds(subject(), passes, ["a", "b"], pooled, 5) == 2.0 * (3 * 2 * 4 * 13 + 1.6 * 40)
    settings = Settings("m", ("a",), ("random",), seeds=1, num_texts=7, max_train=10, epochs=2)
    places = {"a": ([0] * 20, [0] * 5)}
    runs = comparison.plan(settings)
    dense, pruned = 3.5 * 2 * 10 + 5 + 2, 3.5 * 2 * 10 + 5 + 2 * 7 + 2
    assert comparison_seconds({"a": 1.0}, places, settings, runs, 2, "cuda") == (dense + pruned) / 2
