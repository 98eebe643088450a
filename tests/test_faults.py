"""What is left when a run is killed, stopped, or refused by the disk, and what the next run makes of it."""

import json
import signal

import pytest
from safetensors.torch import load_file

from secateur.files import read_lines
from tests.processes import command, touches
from tests.tiny import tiny_model, tiny_texts, tiny_tokenizer

SECTION = "Kills, Ctrl-C and disks"
MOMENTS = "some of its writes, then Ctrl-C later, then a kill later still"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model, and a task with train and dev."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "task").mkdir()
    for split, count, seed in (("train", 24, 0), ("dev", 8, 1)):
        rows = [f"{text}\t{int('good' in text)}" for text in tiny_texts(count, seed)]
        (folder / "task" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder


def line(name, given, out):
    """A small command of each kind that writes a folder."""
    model, task = given / "model", given / "task"
    short = ["--max-length", "16"]
    return {
        "prune": ["prune", model, "--data", task, "--refine", 2, *short, "--device", "cpu", "--out", out],
        "finetune": ["finetune", model, "--data", task, "--epochs", 1, *short, "--device", "cpu", "--out", out],
        "meta-train": [
            "meta-train", "--model", model, "--data", task / "train.tsv", "--out", out, "--steps", 3, *short,
            "--batch-size", 2, "--batches-per-step", 1, "--checkpoint-every", 1,
        ],
        "compare": [
            "compare", "--model", model, "--data", task, "--scorer", "random", "--seeds", 2, "--texts", 8,
            "--max-train", 8, "--jobs", 1, "--device", "cpu", "--out", out,
        ],
    }[name]  # fmt: skip


def results(name, out):
    """What a run has finished: everything that a person would take for a result. Reading it fails for half of one."""
    if name in ("prune", "finetune"):
        about = out / {"prune": "pruning_report.json", "finetune": "finetune_result.json"}[name]
        if not out.exists():
            return {}
        assert json.loads(about.read_text())
        assert (out / "tokenizer.json").is_file()
        return {"model": {k: v.tolist() for k, v in load_file(out / "model.safetensors").items()}}
    if name == "meta-train":
        found = {str(row): True for row in read_lines(out / "log.jsonl")}
        for place in [*out.glob("checkpoint-*"), *out.glob("pruner")]:
            for file in place.glob("*.json"):
                assert json.loads(file.read_text())
            (weights,) = place.glob("*.safetensors")
            found[place.name] = sum(float(v.double().sum()) for v in load_file(weights).values())
        return found
    found = {f"{r['scorer']} {r['seed']}": (r["value"], r["kept_heads"]) for r in read_lines(out / "runs.jsonl")}
    for file in (out / "scores").glob("*.json"):
        found[file.name] = json.loads(file.read_text())["scores"]
    return found


def hidden(folder):
    """What should not be left lying about; the lock of a folder that grows is meant to stay."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".lock")


@pytest.mark.parametrize("name", ["prune", "finetune", "meta-train", "compare"])
def test_killed_stopped_and_killed_again(name, given, tmp_path, outcome):
    """Three ends in one folder, one after the other, at moments when something is being written; then a whole run."""
    grows = name in ("meta-train", "compare")
    (tmp_path / "whole").mkdir()
    whole = command(
        line(name, given, tmp_path / "whole" / "out"), tmp_path / "log", -1, below=tmp_path / "whole"
    ).wait()
    assert whole.code == 0, whole.err
    expected, writes = results(name, tmp_path / "whole" / "out"), touches(whole)
    assert hidden(tmp_path / "whole") == []

    parts = tmp_path / "parts"
    parts.mkdir()
    out, kept = parts / "out", {}
    # Shares of the writes of a whole run; a folder that grows has fewer to come each time.
    shares = (0.6, 0.4, 0.35) if grows else (0.25, 0.5, 1)
    for share, how in zip(shares, (signal.SIGKILL, signal.SIGINT, signal.SIGKILL), strict=True):
        given_line = line(name, given, out) + (["--resume"] if (out / "log.jsonl").exists() else [])
        moment = min(int(writes * share), writes - 1)  # the last is the removal of a lock
        ended = command(given_line, tmp_path / "log", moment, how, parts).wait()
        if how == signal.SIGKILL:
            assert ended.code == -signal.SIGKILL, ended.err
        else:
            assert ended.code == 130, ended.err
            assert "Traceback" not in ended.err
            assert ended.err.strip().splitlines()[-1].startswith("secateur: stopped; ")
            assert hidden(parts) == []
        now = results(name, out)
        if not grows:
            assert now in ({}, expected)
        assert kept.keys() <= now.keys() or name == "meta-train"  # old checkpoints go
        kept = now
    ended = command(line(name, given, out) + (["--resume"] if name == "meta-train" else []), tmp_path / "log").wait()
    assert ended.code == 0, ended.err
    assert results(name, out) == expected
    assert hidden(parts) == []
    if grows:
        assert "going on" in ended.err
        done = "what had finished is kept, the next run says where it goes on and ends with the same results"
    else:
        assert "which a run that was killed had not finished" in ended.err
        done = "no folder that looks finished; the next run says what it removes and ends with the same result"
    outcome(SECTION, f"`{name}` killed after {MOMENTS}", f"{done}; Ctrl-C: exit code 130 and one line")
