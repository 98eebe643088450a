"""A scorer is added by two edits: a file and a line. Everything else picks it up, in a copy of the sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import tiny_model, tiny_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]

SCORER = '''\
"""Later heads first."""

import torch

from secateur.scorers.base import Scorer


class LatestScorer(Scorer):
    """A head's index times `factor`."""

    description = "the index of a head"
    source = "a test"
    passes = "0"
    needs_texts = False

    def __init__(self, factor: float = 2.5) -> None:
        self.factor = factor

    def score(self, task):
        """Count."""
        return {name: self.factor * torch.arange(site.num_units) for name, site in task.sites.items()}
'''

# One process for all questions: starting Python and torch anew for each would take most of the time.
QUESTIONS = """\
import pathlib, sys
import pytest
import secateur
from secateur import cli
from secateur.comparing import protocols

assert str(pathlib.Path(secateur.__file__).parents[2]) == sys.argv[1]
protocols.PROTOCOLS["lite"] = protocols.Protocol(max_train=8, max_length=16, epochs=1, learning_rate=1e-3)
print("== help")
assert cli.main(["score", "--help"]) == 0
print("== compare")
given = ["--model", "model", "--data", "task", "--seeds", "1", "--texts", "4", "--jobs", "1", "--device", "cpu"]
assert cli.main(["compare", *given, "--scorer", "latest", "--out", "c"]) == 0
print("== docs")
sys.path.insert(0, str(pathlib.Path(sys.argv[1]) / "docs"))
from generate import scorers_page
print(scorers_page())
print("== tests")
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", "tests/contract/test_scorers.py", "-k", "latest"]))
"""


def test_everything_takes_up_a_scorer_that_a_file_and_a_line_add(tmp_path):
    folder = tmp_path / "edits"
    folder.mkdir()
    for part in ("src", "tests", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "_build", "generated"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    scorers = folder / "src" / "secateur" / "scorers"
    (scorers / "latest.py").write_text(SCORER)
    registry = (scorers / "__init__.py").read_text()
    line = '    "latest": "secateur.scorers.latest:LatestScorer",\n'
    (scorers / "__init__.py").write_text(registry.replace("SCORERS = {\n", "SCORERS = {\n" + line))
    tiny_model("bert").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "task").mkdir()
    for split in ("train", "dev"):
        rows = [f"{text}\t{number % 2}" for number, text in enumerate(tiny_texts(8))]
        (folder / "task" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(folder)])}
    done = subprocess.run(
        [sys.executable, "-c", QUESTIONS, str(folder)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    assert "latest" in parts["help"]
    assert "latest" in parts["compare"]
    assert (folder / "c" / "scores" / "task-latest-0.json").is_file()
    assert "latest" in (folder / "c" / "report.html").read_text()
    collected = [line for line in parts["tests"].splitlines() if "::" in line]
    assert {line.split("::")[1].split("[")[0] for line in collected} >= {
        "test_every_scorer_scores_every_head_and_leaves_the_model_alone",
        "test_every_scorer_describes_itself",
    }
    assert all("latest" in line for line in collected)
    section = parts["docs"].split("## latest\n")[1].split("\n## ")[0]
    for words in ("The index of a head.", "Source: a test", "Needs: nothing but the weights", "`factor=2.5`"):
        assert words in section
