"""The README's Python blocks, run as they stand, with the Hub id replaced by the folder of the same model."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from secateur.cli import cli

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
def test_python_blocks_run(minilm_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    names = {"tokenizer": tokenizer}
    for number, block in enumerate(blocks):
        if number == 1:  # a model that is still whole
            names["model"] = names["AutoModel"].from_pretrained(minilm_folder)
            names["batch"] = tokenizer(names["texts"], padding=True, return_tensors="pt")
        exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm_folder)), names)
    assert "kept 36 of 72 heads (pruning ratio 0.50)" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "config.json").is_file()


def test_every_command_is_in_the_readme():
    for name in cli.commands:
        assert f"secateur {name}" in README or f"make {name}" in README, name
