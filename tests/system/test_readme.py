"""The README's Python block, run as it stands, with the Hub id replaced by the folder of the same model."""

import re
from pathlib import Path

import pytest

from secateur.cli import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
def test_the_python_block_runs(minilm_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Three are too few to refit or to teach, so that pruning takes seconds and says what it left out.
    Path("texts.txt").write_text("a stirring , funny film\nthe plot is thin\nit rises above its clichés", "utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm_folder)), names)
    assert "kept 36 of 72 heads, 4416 of 9216 neurons, macs 0.487" in capsys.readouterr().out
    widths = [layer.intermediate.dense.out_features for layer in names["model"].encoder.layer]
    assert sum(widths) == 4416


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_every_command_is_in_the_page_of_commands():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f"secateur {name}" in page, name
