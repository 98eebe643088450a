"""What is left when a run is killed, stopped, or refused by the disk, and what the next run makes of it."""

import errno
import json
import os
import signal
import stat
import subprocess
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secateur import cli
from secateur.comparing import workers
from secateur.errors import InvalidInputError, SecateurError, WriteError
from secateur.report import plots
from secateur.support import files
from secateur.support.files import append_line, check_new_folder, new_folder, read_lines, write_text
from tests.support.processes import command, touches
from tests.support.report_data import comparison_rows, write_comparison
from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SECTION = "Kills, Ctrl-C and disks"
RESUMED = ("meta-train", "joint-train")
GROWING = (*RESUMED, "compare")
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
            "--batch-size", 3, "--batches-per-step", 1, "--checkpoint-every", 1,
        ],
        "joint-train": [
            "joint-train", "--model", model, "--data", task / "train.tsv", "--out", out, "--samples", 2, *short,
            "--texts", 4, "--judges", 1, "--batch-size", 4,
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
    if name == "joint-train":
        places = [*(out / "samples").glob("*.safetensors"), *out.glob("pruner/*.safetensors")]
        return {place.name: {k: v.tolist() for k, v in load_file(place).items()} for place in places}
    found = {f"{r['scorer']} {r['seed']}": (r["value"], r["kept_heads"]) for r in read_lines(out / "runs.jsonl")}
    for file in (out / "scores").glob("*.json"):
        found[file.name] = json.loads(file.read_text())["scores"]
    return found


def hidden(folder):
    """What should not be left lying about; the lock of a folder that grows is meant to stay."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".lock")


@pytest.mark.parametrize("name", ["prune", "finetune", "meta-train", "joint-train", "compare"])
def test_killed_stopped_and_killed_again(name, given, tmp_path, outcome):
    """Three ends in one folder, one after the other, at moments when something is being written; then a whole run."""
    grows = name in GROWING
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
    # Shares of the writes of a whole run; a run that goes on has fewer to come each time.
    shares = (0.6, 0.4, 0.35) if grows else (0.25, 0.5, 0.6 if name == "prune" else 1)
    for share, how in zip(shares, (signal.SIGKILL, signal.SIGINT, signal.SIGKILL), strict=True):
        given_line = line(name, given, out) + (["--resume"] if name in RESUMED and out.exists() else [])
        moment = min(int(writes * share), writes - 1)  # the last is the removal of a lock
        ended = command(given_line, tmp_path / "log", moment, how, parts).wait()
        if how == signal.SIGKILL:
            assert ended.code == -signal.SIGKILL, ended.err
        else:
            assert ended.code == 130, ended.err
            assert "Traceback" not in ended.err
            assert ended.err.strip().splitlines()[-1].startswith("secateur: stopped; ")
            assert {place.partition("/")[0] for place in hidden(parts)} <= {".out.steps"}
        now = results(name, out)
        if not grows:
            assert now in ({}, expected)
        assert kept.keys() <= now.keys() or name == "meta-train"  # old checkpoints go
        kept = now
    ended = command(line(name, given, out) + (["--resume"] if name in RESUMED else []), tmp_path / "log").wait()
    assert ended.code == 0, ended.err
    assert results(name, out) == expected
    assert hidden(parts) == []
    if grows:
        assert "going on" in ended.err
        done = "what had finished is kept, the next run says where it goes on and ends with the same results"
    else:
        assert "which a run that was killed had not finished" in ended.err
        assert ("going on with the mask, refit of" in ended.err) == (name == "prune")
        next_run = "goes on after the steps that were done" if name == "prune" else "says what it removes"
        done = f"no folder that looks finished; the next run {next_run} and ends with the same result"
    outcome(SECTION, f"`{name}` killed after {MOMENTS}", f"{done}; Ctrl-C: exit code 130 and one line")


@pytest.fixture
def disk(tmp_path):
    """`disk(size)` mounts a filesystem of that many KiB, or gives the one that is mounted another size or mode."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        remount = ",remount" if place.is_mount() else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options + remount, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a small filesystem: {done.stderr.decode().strip()}")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


def run(capsys, words):
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr().err


# KiB that take what comes first and not what comes then: the weights, the second checkpoint, one of the rows.
@pytest.mark.parametrize(
    ("name", "size"), [("prune", 64), ("finetune", 64), ("meta-train", 400), ("joint-train", 40), ("compare", 16)]
)
def test_the_disk_fills_up(name, size, given, disk, capsys, outcome):
    out = disk(f"size={size}k") / "out"
    code, err = run(capsys, line(name, given, out))
    assert code == 2, err
    message = err.strip().splitlines()[-1]
    assert message.startswith("secateur: error: ")
    assert "No space left on device" in message
    assert hidden(out.parent) == []
    kept = results(name, out)
    assert bool(kept) == (name in GROWING)
    disk("size=20m")
    more = ["--resume"] if name in RESUMED else []
    code, err = run(capsys, [*line(name, given, out), *more])
    assert code == 0
    assert results(name, out)
    came = "one line, exit code 2; " + ("what had finished is kept" if kept else "nothing is left")
    outcome(SECTION, f"the disk fills up during `{name}`", f"{came}; once there is room the same command succeeds")


@pytest.mark.parametrize("name", ["score", "prune", "finetune", "meta-train", "joint-train", "compare", "export"])
def test_a_read_only_folder_is_refused_before_the_work(name, given, disk, capsys, outcome):
    disk("size=64k")
    out = disk("ro") / "out"
    if name in ("score", "export"):
        words = [name, given / "model", "--out", out]
        words += {"score": ["--data", given / "task"], "export": ["--format", "standalone"]}[name]
    else:
        words = line(name, given, out)
    code, err = run(capsys, words)
    assert code == 2
    (message,) = err.strip().splitlines()  # no progress bar: nothing had been done
    outcome(SECTION, f"`{name}` into a read-only folder", message)


def test_two_runs_into_one_folder(given, tmp_path, capsys, outcome):
    """The second is refused before it has done anything, and the first one's result is whole."""
    out = tmp_path / "out"
    words = line("prune", given, out)
    with new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        code, err = run(capsys, words)
        assert code == 2
        (message,) = err.strip().splitlines()
        assert "`out` must be written by one run at a time" in message
        found = []

        def other():
            with pytest.raises(InvalidInputError, match="one run at a time"), new_folder(out):
                found.append("entered")

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert found == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    outcome("At the same time", "two prunings into one folder", message)


def test_a_folder_that_fills_behind_a_runs_back_is_left_alone(tmp_path):
    with pytest.raises(InvalidInputError, match="new or empty"), new_folder(tmp_path / "out"):
        write_text(tmp_path / "out" / "mine", "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut a rename may be there and what was written before it not, unless both were asked for."""
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {b}") or replace(a, b))
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    staging = tmp_path / ".out.unfinished"
    before, after = events[: events.index(f"-> {tmp_path / 'out'}")], events[-1]
    assert {str(staging), str(staging / "inner"), str(staging / "inner" / "file")} == set(before)
    assert after == str(tmp_path)
    events.clear()
    write_text(tmp_path / "text", "x")
    assert [e.startswith("-> ") for e in events] == [False, True, False]
    assert events[-1] == str(tmp_path)
    events.clear()
    append_line(tmp_path / "lines", 1)
    assert events == [str(tmp_path / "lines"), str(tmp_path)]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(InvalidInputError, match="neither a mount point nor the folder that this runs in"):
        check_new_folder(".")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(InvalidInputError, match="name a new folder inside it"):
        check_new_folder(tmp_path / "volume")
    assert check_new_folder(tmp_path / "volume" / "new")


def test_files_have_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_root_replaces_stays_its_owners(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    os.chown(path, 12345, 23456)
    path.chmod(0o600)
    write_text(path, "after")
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 23456, 0o600)


def test_an_owner_that_cannot_be_kept_stops_no_writing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(0o600)
    there = path.stat()

    def refused(*args):
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(files, "status", lambda path: os.stat_result((*there[:4], 12345, *there[5:])))
        patch.setattr(os, "fchown", refused)
        write_text(path, "after")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("after", 0o600)


def test_a_disk_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "disk"
    path.write_text("file systems")
    found = path.stat()
    block = os.stat_result((stat.S_IFBLK | 0o600, *found[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *args, **kwargs: block)
        with pytest.raises(InvalidInputError, match="`path` must name no disk"):
            write_text(path, "x")
    assert path.read_text() == "file systems"


def test_a_line_that_does_not_fit_leaves_the_lines_before_it(disk, outcome):
    path = disk("size=8k") / "lines"
    append_line(path, "first")
    with pytest.raises(WriteError, match="No space left on device") as caught:
        append_line(path, "x" * 20_000)
    assert path.read_bytes() == b'"first"\n'
    with pytest.raises(WriteError):
        write_text(path, "x" * 20_000)
    append_line(path, "second")
    assert read_lines(path) == ["first", "second"]
    assert os.listdir(path.parent) == ["lines"]
    outcome(SECTION, "a line that does not fit on the disk", caught.value)


def test_plots_and_their_page_are_there_all_or_none(tmp_path, monkeypatch, capsys):
    write_comparison(tmp_path / "runs", comparison_rows(), scores=False)
    line = ["report", tmp_path / "runs", "--out", tmp_path / "page.html", "--plots", tmp_path / "plots" / "inner"]
    sync, calls = os.fsync, []
    drawn = lambda runs, folder, kind: {folder / f"{name}.svg": b"<svg/>" for name in "abc"}  # noqa: E731
    monkeypatch.setattr(plots, "draw_plots", drawn)

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    for there in ([], ["an earlier one"]):
        for name in there:
            (tmp_path / "plots" / "inner").mkdir(parents=True)
            (tmp_path / "plots" / "inner" / name).write_text(name)
        before = sorted(path for path in tmp_path.rglob("*"))
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            code, said = run(capsys, line)
        assert (code, said.count("\n")) == (2, 1)
        assert "cannot be written: No space left on device; nothing half-written is left; make room there" in said
        assert sorted(path for path in tmp_path.rglob("*")) == before
    assert run(capsys, line)[0] == 0
    assert (tmp_path / "page.html").is_file()
    assert len(list((tmp_path / "plots" / "inner").iterdir())) == 4


def test_lines_stay_where_their_file_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, "first")

    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(WriteError, match="Too many open files"):
            append_line(path, "second")
    assert read_lines(path) == ["first"]


def test_what_a_library_in_rust_says_of_the_disk(tmp_path):
    with (
        pytest.raises(WriteError, match="out cannot be written: No space left on device"),
        new_folder(tmp_path / "out"),
    ):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), new_folder(tmp_path / "out"):
        raise RuntimeError("something else")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


class _Pool:
    """Two runs at once: the second fails, then the first ends; the third had not begun."""

    def submit(self, work, number):
        future = Future()
        if number < 2:
            future.set_running_or_notify_cancel()
            threading.Timer(0.1 if number == 0 else 0, work, (future, number)).start()
        return future


def test_a_run_that_fails_does_not_take_those_with_it_that_end_after_it():
    def work(future, number):
        future.set_exception(ValueError("no")) if number else future.set_result("done")

    each = workers.each(_Pool(), work, [(0,), (1,), (2,)], "", False)
    assert next(each) == "done"
    with pytest.raises(ValueError, match="no"):
        next(each)


def test_a_worker_that_is_killed_is_one_line(outcome):
    def work(future, number):
        future.set_exception(BrokenProcessPool("a process died"))

    with pytest.raises(SecateurError, match="go on with fewer jobs") as caught:
        list(workers.each(_Pool(), work, [(1,)], "", False))
    outcome(SECTION, "a worker process of `compare` is killed, as for want of memory", caught.value)


def test_ctrl_c_ends_every_process_of_a_comparison(given, tmp_path, outcome):
    """At once, in one line, and the rows that were there stay."""
    out = tmp_path / "out"
    words = line("compare", given, out)
    words[words.index("--jobs") + 1], words[words.index("--seeds") + 1] = 2, 8
    running = command(words, tmp_path / "log", forked_workers=True)
    while not read_lines(out / "runs.jsonl"):
        assert running.process.is_alive(), running.wait()
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    message = ended.err.strip().splitlines()[-1]
    assert message == "secateur: stopped; the runs that had finished stay; the same command goes on"
    assert 0 < len(read_lines(out / "runs.jsonl")) < 16
    outcome(SECTION, "Ctrl-C during a `compare` of two processes", message)
