"""The documentation says what the code says; `make docs` builds it with warnings as errors."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import secateur
from secateur.scorers import SCORERS, scorer_class

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_has_a_section_with_its_options(name, generate):
    page = generate.scorers_page()
    section = page.split(f"## {name}\n")[1].split("\n## ")[0]
    kind = scorer_class(name)
    assert f"- Source: {kind.source}" in section
    options = {} if kind.__init__ is object.__init__ else inspect.signature(kind).parameters
    for option in options.values():
        assert f"`{option.name}={option.default!r}`" in section
    assert (" labels" in section.split("- Needs:")[1].splitlines()[0]) is kind.needs_labels


def test_every_public_name_is_in_the_api_page(generate):
    page = generate.api_page()
    for name in secateur.__all__:
        assert re.search(rf"auto(class|function):: secateur\.{name}$", page, re.MULTILINE), name


def readme_rows():
    """Scorer → the cells of its row in the README's two tables."""
    rows = re.findall(r"^\| `([\w-]+)`(?: \(default\))? \| (.*) \|$", README, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows if name in SCORERS}


def test_the_readme_has_every_scorer_once_and_no_other():
    names = re.findall(r"^\| `([\w-]+)`", README.split("## How heads are scored")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(names) == sorted(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_the_readmes_table_agrees_with_the_registry(name):
    _, passes, last = readme_rows()[name]
    kind = scorer_class(name)
    assert (last == "yes") is kind.needs_labels  # the first table has no labels, and recovery in this column
    first = re.match(r"\d+", passes)
    assert first is not None
    assert kind.passes.startswith(first[0]), f"README: {passes}, registry: {kind.passes}"


def test_links_and_pictures_of_the_pages_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        # What stands in code is no link: an error that quotes `layers[i](x)`, say.
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for place in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
            if not place.startswith("generated/"):
                assert (page.parent / place).exists(), f"{page.name}: {place}"
