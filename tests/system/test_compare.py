"""Comparisons: the same rows in any order and after any kill."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch

from secateur import cli
from secateur.comparing import compare as comparison
from secateur.comparing.compare import compare
from secateur.comparing.folder import content_of, differences
from secateur.comparing.plan import DENSE, Settings, plan
from secateur.comparing.protocols import PROTOCOLS, Protocol
from secateur.errors import InvalidInputError
from secateur.report.numbers import DASH
from secateur.report.reading import read_runs
from secateur.support.files import append_line, read_lines
from tests.support.processes import command
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and two tasks that it can learn a little of."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for task, pairs in (("singles", False), ("pairs", True)):
        (folder / task).mkdir()
        for split, count, seed in (("train", 24, 0), ("dev", 12, 1)):
            header = "sentence1\tsentence2\tlabel" if pairs else "sentence\tlabel"
            texts = tiny_texts(count, seed, pairs)
            lines = ["\t".join([*((t,) if isinstance(t, str) else t), str(int("good" in str(t)))]) for t in texts]
            (folder / task / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return folder


SHORT = Protocol(max_train=16, max_length=16, epochs=1, learning_rate=1e-3)


def settings_of(folder):
    return Settings(
        str(folder / "model"), (str(folder / "singles"), str(folder / "pairs")), ("random", "contribution"),
        ratios=(0.5,), seeds=2, num_texts=8,
    )  # fmt: skip


@pytest.fixture
def settings(folder, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "lite", SHORT)
    return settings_of(folder)


def without_cost(rows):
    return [{name: value for name, value in row.items() if name != "cost"} for row in rows]


def in_order(rows):
    return sorted(without_cost(rows), key=lambda row: (row["seed"], row["task"], row["scorer"], row["ratio"]))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The rows of a whole comparison, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "c"
    with mock.patch.dict(PROTOCOLS, lite=SHORT):
        return compare(settings_of(folder), out, progress=False), out


def test_every_cell_once_with_its_dense_partner(whole):
    rows, out = whole
    assert [(r["task"], r["scorer"], r["ratio"], r["seed"]) for r in rows] == [
        (task, scorer, ratio, seed)
        for seed in (0, 1)
        for task in ("singles", "pairs")
        for scorer, ratio in ((DENSE, 0.0), ("random", 0.5), ("contribution", 0.5))
    ]
    pruned = [r for r in rows if r["scorer"] != DENSE]
    assert all(len(kept) == 2 for r in pruned for kept in r["kept_heads"].values())
    assert all(r["cost"]["scoring_seconds"] > 0 for r in pruned)
    assert len({r["value"] for r in rows}) > 1
    assert sorted(p.name for p in (out / "scores").iterdir())[0] == "pairs-contribution-0.json"


def test_stopped_and_resumed_gives_the_rows_of_one_go(settings, whole, tmp_path, monkeypatch):
    settings, expected, trained = replace(settings, seeds=1), [row for row in whole[0] if row["seed"] == 0], []
    inner = comparison.train_run

    def interrupted(*arguments):
        if len(trained) in (2, 4):
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(arguments[1])
        return inner(*arguments)

    monkeypatch.setattr(comparison, "train_run", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(settings, tmp_path / "parts", progress=False)
        table = tmp_path / "parts" / "runs.jsonl"
        table.write_bytes(table.read_bytes() + b'{"data": "half a li')
    assert without_cost(compare(settings, tmp_path / "parts", progress=False)) == without_cost(expected)
    assert len(read_lines(table)) == len(expected)
    runs = [run for run in trained if run != "stopped"]
    assert len(runs) == len(set(runs)) == len(expected) == 6  # nothing was done twice


def test_what_only_adds_runs_goes_on_and_other_settings_do_not_mix(settings, whole, tmp_path):
    first = replace(settings, data=settings.data[:1], scorers=("random",), seeds=1)
    one = compare(first, tmp_path / "c", progress=False)
    shutil.copytree(tmp_path / "c", tmp_path / "ratios")
    more = compare(replace(first, ratios=(0.25, 0.5)), tmp_path / "ratios", progress=False)
    grown = replace(settings, scorers=("contribution", "random"))
    rows = compare(grown, tmp_path / "c", progress=False)
    assert [len(found) for found in (one, more, rows)] == [1 + 1, 1 + 2, 2 * 2 * (1 + 2)]
    for found in (more, rows):
        assert [row for row in found if row in one] == one  # timings too: they were not done again
    assert in_order(rows) == in_order(whole[0])
    for change in (
        {"ratios": (0.25,)}, {"seeds": 1}, {"data": settings.data[1:]}, {"scorers": ("random",)}, {"num_texts": 9},
        {"bf16": True}, {"scorers": ("random", "contribution", "smp"), "pruners": {"smp": "x"}, "threads": 2},
        {"restore": "reconstruct"},
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=f"other {list(change)[-1]};"):
            compare(replace(grown, **change), tmp_path / "c", progress=False)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="`out` must be a new folder"):
        compare(settings, tmp_path / "else", progress=False)


def test_pruned_runs_may_be_reconstructed(settings, tmp_path):
    settings = replace(settings, data=settings.data[1:], seeds=1, num_texts=24)
    plain = compare(settings, tmp_path / "plain", progress=False)
    rows = compare(replace(settings, restore="reconstruct"), tmp_path / "c", progress=False)
    for one, other in zip(plain, rows, strict=True):
        assert one["kept_heads"] == other["kept_heads"]
        assert ("reconstruction" in other) == ("reconstruction_seconds" in other["cost"]) == (one["scorer"] != DENSE)
        without, after = other.get("reconstruction", (0, 0))
        assert (one["train_loss"] != other["train_loss"]) == (after < without)
    assert any(after < without for without, after in (row.get("reconstruction", (0, 0)) for row in rows))


def test_a_pruner_may_come_with_its_scorer_and_not_after_it(settings):
    found = asdict(replace(settings, scorers=("random", "smp")))
    late = asdict(replace(settings, scorers=("random", "smp"), pruners={"smp": "x"}))
    added = asdict(replace(settings, scorers=("random", "smp", "smp-plus"), pruners={"smp-plus": "x"}))
    assert differences(found, late) == ["pruners"]
    assert differences(late, found) == ["pruners"]
    assert differences(found, added) == []


def test_a_folder_from_before_a_setting_was_known_goes_on(settings, tmp_path):
    settings = replace(settings, data=settings.data[:1], scorers=("random",), seeds=1)
    compare(settings, tmp_path / "c", progress=False)
    file = tmp_path / "c/settings.json"
    old = json.loads(file.read_text())
    assert old.pop("learning_rate", 0) is None
    file.write_text(json.dumps(old))
    assert len(compare(settings, tmp_path / "c", progress=False)) == 2


def test_content_that_changed_is_refused_by_name(settings, folder, tmp_path):
    """The same places hold another model, other texts, other labels, another tokenizer: rows of both would mix."""
    for name in ("model", "singles"):
        shutil.copytree(folder / name, tmp_path / name)
    model, task, out = tmp_path / "model", tmp_path / "singles", tmp_path / "c"
    own = replace(settings, model=str(model), data=(str(task),), scorers=("random",), seeds=1)
    rows = compare(own, out, progress=False)
    labels = (task / "dev.tsv").read_text().replace("\t0\n", "\t1\n")
    for file, change, what in (
        (model / "model.safetensors", lambda: tiny_model("bert", seed=5).save_pretrained(model), f"model {model}"),
        (model / "config.json", lambda: _set(model / "config.json", hidden_act="relu"), f"model {model}"),
        (model / "tokenizer.json", lambda: _set(model / "tokenizer.json", added_tokens=[]), f"model {model}"),
        (task / "dev.tsv", lambda: (task / "dev.tsv").write_text(labels), "task singles"),
    ):
        content = file.read_bytes()
        change()
        with pytest.raises(InvalidInputError, match=f"before the content of {what} changed; choose another folder"):
            compare(replace(own, seeds=2), out, progress=False)
        file.write_bytes(content)
    (model / "README.md").write_text("of no weight")
    assert compare(own, out, progress=False) == rows

    other = tmp_path / "other"
    shutil.copytree(out, other)
    _set(other / "settings.json", content={f"model {model}": "0" * 16})
    assert len(read_runs([out, other])) == 2  # a page does not join them either
    _set(other / "settings.json", content={})
    assert len(read_runs([out, other])) == 1
    assert compare(own, other, progress=False) == rows  # a folder from before there were fingerprints goes on


def _set(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_pruner_that_changed_is_refused(settings, folder, tmp_path):
    from secateur.pruners.map_network import MetaPruner

    MetaPruner().save_pretrained(tmp_path / "singles")
    own = replace(settings, data=settings.data[:1], scorers=("smp",), pruners={"smp": str(tmp_path / "{task}")})
    before = content_of(own, {"singles": "1"})
    torch.manual_seed(1)
    shutil.rmtree(tmp_path / "singles")
    MetaPruner(initial_std=0.5).save_pretrained(tmp_path / "singles")
    after = content_of(own, {"singles": "1"})
    assert [name for name in after if after[name] != before[name]] == [f"pruner {tmp_path / 'singles'}"]


def test_the_learning_rate_and_the_epochs_replace_the_protocols(settings, whole, tmp_path):
    few = replace(settings, data=settings.data[:1], scorers=("random",), seeds=1)
    changed = replace(few, learning_rate=1e-9, epochs=2.0)
    assert (changed.training.learning_rate, changed.training.epochs, changed.training.max_train) == (1e-9, 2.0, 16)
    assert settings.training == PROTOCOLS["lite"]
    slow = compare(changed, tmp_path / "slow", progress=False)[0]
    usual = whole[0][0]
    assert slow["train_loss"] > usual["train_loss"]


def test_a_dense_model_that_learned_nothing_is_said_to(folder, tmp_path, monkeypatch, capsys):
    """Where every run gives the same answers, random heads would keep 100%."""
    monkeypatch.setitem(PROTOCOLS, "lite", replace(SHORT, learning_rate=1e-9))
    out = tmp_path / "c"
    line = ["compare", "--model", folder / "model", "--data", folder / "singles", "--scorer", "random", "--seeds", "1"]
    assert (
        cli.main([str(word) for word in [*line, "--texts", "8", "--jobs", "1", "--device", "cpu", "--out", out]]) == 0
    )
    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    (dense, _) = read_lines(out / "runs.jsonl")
    labels = [row.split("\t")[1] for row in (folder / "singles/dev.tsv").read_text().splitlines()[1:]]
    assert dense["value"] <= dense["constant"] == max(labels.count(each) for each in "01") / len(labels)
    for shown in (printed, page):
        assert "singles: in 1 of 1 runs the dense model is no better than a constant answer" in shown
        assert "more training texts, more epochs or another learning rate" in shown
        assert "100.0%" not in shown
    assert DASH in printed
    assert "highest retention" not in page


def test_scorers_that_need_labels_or_the_ratio_get_them(settings, tmp_path):
    chosen = replace(settings, data=settings.data[:1], scorers=("taylor", "dsp"), ratios=(0.25, 0.5), seeds=1)
    rows = compare(chosen, tmp_path / "c", progress=False)
    assert len(rows) == 1 + 2 * 2
    names = {p.stem for p in (tmp_path / "c" / "scores").iterdir()}
    assert names == {"singles-taylor-0", "singles-dsp-0.25-0", "singles-dsp-0.5-0"}


def test_each_scorer_gets_its_own_pruner(folder, tmp_path, monkeypatch, capsys):
    """Scores differ from those of the shipped networks exactly where another one was given."""
    from secateur.pruners.joint_network import JointPruner
    from secateur.pruners.map_network import MetaPruner

    torch.manual_seed(0)
    MetaPruner().save_pretrained(tmp_path / "maps-only")
    monkeypatch.setitem(PROTOCOLS, "lite", Protocol(max_train=8, max_length=16, epochs=1, learning_rate=1e-3))
    line = ["compare", "--model", folder / "model", "--data", folder / "singles", "--seeds", "1", "--jobs", "1"]
    line += ["--texts", "8", "--device", "cpu", "--scorer", "smp", "--scorer", "smp-plus"]
    JointPruner().save_pretrained(tmp_path / "singles")
    own = {"smp": f"smp={tmp_path / 'maps-only'}", "smp-plus": f"smp-plus={tmp_path / '{task}'}"}
    given = {"none": (), "smp": ("smp",), "both": ("smp", "smp-plus")}
    scores = {}
    for name, chosen in given.items():
        pruners = [word for scorer in chosen for word in ("--pruner", own[scorer])]
        assert cli.main([str(word) for word in [*line, *pruners, "--out", tmp_path / name]]) == 0
        assert f"report: {tmp_path / name / 'report.html'}" in capsys.readouterr().out
        for scorer in own:
            file = tmp_path / name / "scores" / f"singles-{scorer}-0.json"
            scores[name, scorer] = json.loads(file.read_text())["scores"]
    assert scores["none", "smp"] != scores["smp", "smp"] == scores["both", "smp"]
    assert scores["none", "smp-plus"] == scores["smp", "smp-plus"] != scores["both", "smp-plus"]
    assert "2 scorers compared on 1 task, 1 seed" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize("given", [("folder",), ("nobody=folder",), ("smp=",), ("smp=a", "smp=b")])
def test_a_pruner_that_names_no_scorer_is_one_line(given, folder, tmp_path, capsys):
    line = ["compare", "--model", str(folder / "model"), "--data", str(folder / "singles"), "--scorer", "smp"]
    pruners = [word for item in given for word in ("--pruner", item)]
    assert cli.main([*line, *pruners, "--out", str(tmp_path / "c")]) == 2
    err = capsys.readouterr().err
    assert "`pruner` must be" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorers": ("nobody",)}, "scorers"),
        ({"scorers": ()}, "scorers"),
        ({"scorers": ("random", "random")}, "scorers"),
        ({"ratios": (1.0,)}, "ratios"),
        ({"seeds": 0}, "seeds"),
        ({"threads": 0}, "threads"),
        ({"protocol": "heavy"}, "protocol"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"epochs": float("nan")}, "epochs"),
        ({"pruners": {"smp": "x"}}, "pruners"),
        ({"pruners": {"random": "x"}}, "pruners"),
    ],
)
def test_settings_out_of_range(settings, change, message):
    with pytest.raises(InvalidInputError, match=f"`{message}` must"):
        replace(settings, **change)


def test_a_file_has_no_dev_split(settings, folder, tmp_path):
    data = (settings.data[0], str(folder / "pairs" / "train.tsv"))
    with pytest.raises(InvalidInputError, match="`data` must have train and dev apart"):
        compare(replace(settings, data=data), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_a_device_that_cannot_train_is_refused_before_the_scoring(settings, tmp_path):
    with pytest.raises(InvalidInputError, match="`device` must name no other device than the first"):
        compare(settings, tmp_path / "c", device="cpu:1", progress=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", ["[]", '{"editor": 1}'])
def test_a_folder_with_other_settings_is_no_comparison(content, settings, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InvalidInputError, match="`out` must be a new folder, or one with a comparison"):
        compare(settings, tmp_path, progress=False)
    assert (tmp_path / "settings.json").read_text() == content


def test_a_row_that_is_no_run_is_named(settings, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(asdict(settings)))
    (tmp_path / "runs.jsonl").write_text('{"scorer": "dense"}\n')
    with pytest.raises(InvalidInputError, match=r"runs\.jsonl, line 1 has no data, task"):
        compare(settings, tmp_path, progress=False)


def test_two_tasks_of_one_name(settings, folder, tmp_path):
    copy = tmp_path / "singles"
    copy.mkdir()
    for split in ("train.tsv", "dev.tsv"):
        (copy / split).write_bytes((folder / "singles" / split).read_bytes())
    with pytest.raises(InvalidInputError, match="the same task name 'singles'"):
        compare(replace(settings, data=(settings.data[0], str(copy))), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


CONFIG = """\
model: {folder}/model
data: [{folder}/singles]
scorer: [random, contribution]
ratio: [0.5]
seeds: 2
texts: 8
"""


def test_killed_at_a_random_moment_in_two_processes(folder, tmp_path):
    """A real process with two workers, killed and started again; then the same from one process without a kill."""
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=folder))
    line = ["compare", "--config", str(tmp_path / "c.yaml"), "--device", "cpu"]
    killed, table = [*line, "--jobs", "2", "--out", str(tmp_path / "killed")], tmp_path / "killed" / "runs.jsonl"
    running = command(killed, tmp_path / "log")
    while not read_lines(table):
        assert running.process.is_alive(), running.wait()
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    running.process.kill()
    ended = running.wait()
    assert ended.code == -signal.SIGKILL
    assert "torch" not in ended.err  # workers are as quiet as the command
    before = len(read_lines(table))
    assert 0 < before < 6
    _wait_until_gone(running.process.pid)
    done = command(killed, tmp_path / "log", forked_workers=True).wait()
    assert done.code == 0, done.err
    assert f"going on: 4 scorings, {before} of 6 runs are done" in done.err
    rows = read_lines(table)
    assert len({(r["scorer"], r["seed"]) for r in rows}) == len(rows) == 6
    alone = tmp_path / "alone"
    assert cli.main([*line, "--jobs", "1", "--out", str(alone)]) == 0
    key = lambda row: (row["scorer"], row["seed"])  # noqa: E731
    assert sorted(without_cost(rows), key=key) == sorted(without_cost(read_lines(alone / "runs.jsonl")), key=key)


def _wait_until_gone(group):
    """Workers end by themselves when the process that started them is killed."""
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("a worker was still there 30 s after its parent's death")


def test_a_folder_in_use_is_refused(settings, tmp_path):
    from filelock import FileLock

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "settings.json").write_text(json.dumps(json.loads(json.dumps(vars(settings)))))
    with FileLock(tmp_path / "c" / ".lock"), pytest.raises(InvalidInputError, match="one run at a time"):
        compare(settings, tmp_path / "c", progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is no YAML"),
        ("- a\n- b", "flag: value"),
        ("modell: x", "modell"),
        ("seeds: 0", "seeds"),
        ("ratio: [1.5]", "ratio"),
        ("scorer: nobody", "nobody"),
        ("ratio:", "`ratio` must have a value"),
        ("ratio: [[0.5]]", "`ratio` must have a value"),
        ("pruner:", "`pruner` must have a value"),
    ],
)
def test_bad_config_is_one_line(text, message, tmp_path, capsys):
    if message in ("seeds", "ratio", "nobody"):
        text += f"\nmodel: m\ndata: {tmp_path}" + ("" if "scorer" in text else "\nscorer: random")
    (tmp_path / "c.yaml").write_text(text)
    code = cli.main(["compare", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o")])
    err = capsys.readouterr().err
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_plan_puts_whole_seeds_first(settings):
    seeds = [run.seed for run in plan(settings)]
    assert seeds == sorted(seeds)
    assert len(seeds) == 2 * 2 * 3


def test_lines_on_the_disk(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"c": "é\n"})
    assert read_lines(path) == [{"a": 1}, {"c": "é\n"}]
    path.write_bytes(b"no json\n" + path.read_bytes())
    with pytest.raises(InvalidInputError, match="line 1"):
        read_lines(path)
