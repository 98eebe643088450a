"""A few bytes that ask for all memory, all time or a traceback: each is one line and exit code 2."""

import contextlib
import io
import json
import resource
import signal
import time

from secateur import cli
from tests.support.processes import outcome_within

DEEP, HALF = "[" * 100_000 + "]" * 100_000, '"\\ud800"'
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
HEADS = 200_000


def report_of(heads):
    scores = {"site": [0.5] * heads}
    return {"kind": "scores", "scorer": "random", "scores": scores, "num_groups": {"site": heads}}


FILES = {
    "aliases.yaml": (LAUGHS, "compare", "must have no aliases, got *a; write the value out"),
    "deep.yaml": ("out: " + "[" * 5000 + "]" * 5000, "compare", "must nest lists and objects at most 64 deep"),
    "half.yaml": (f"out: {HALF}", "compare", "must hold text, got half a character"),
    "date.yaml": ("out: 2020-99-99", "compare", "is no YAML"),
    "large.yaml": ("# " + "x" * 2**20, "compare", "must have at most 1048576 bytes"),
    "deep.json": ('{"kind": ' + DEEP + "}", "report", "must nest lists and objects at most 64 deep"),
    "nested.json": ('{"kind": ' + "[" * 500 + "]" * 500 + "}", "report", "must nest lists and objects at most 64 deep"),
    "half.json": ('{"kind": "scores", "scorer": ' + HALF + "}", "report", "must hold text, got half a character"),
    "half_row.jsonl": ('{"data": ' + HALF + "}\n", "report", "line 1 must hold text, got half a character"),
    "deep_row.jsonl": (DEEP + "\n", "report", "line 1 must nest lists and objects at most 64 deep"),
    "heads.json": (json.dumps(report_of(HEADS)), "report", "must hold at most 50000 heads for one page, got 200000"),
}


def run_all(folder):
    """Give each file to a command, and write down what comes of it."""
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
    found = {}
    for name, (_, command, _) in FILES.items():
        line = [command, "--config", f"{folder}/{name}"] if command == "compare" else [command, f"{folder}/{name}"]
        signal.alarm(20)
        start, said = time.process_time(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(line)
        found[name] = (code, said.getvalue(), time.process_time() - start)
    signal.alarm(0)
    (folder / "found").write_text(json.dumps(found))


def test_hostile_files_are_one_line_and_soon(tmp_path):
    for name, (content, _, _) in FILES.items():
        (tmp_path / name).write_text(content)
    raised = outcome_within(500, run_all, tmp_path)
    assert raised == ("", "")
    found = json.loads((tmp_path / "found").read_text())
    for name, (_, _, message) in FILES.items():
        code, said, seconds = found[name]
        assert (name, code, said.count("\n")) == (name, 2, 1), said
        assert message in said
        assert name == "heads.json" or name in said
        assert len(said) < 500
        assert seconds < 5
