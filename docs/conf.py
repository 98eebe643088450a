"""How Sphinx builds these pages: `make docs`."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from generate import all_texts_table, api_page, mutation_tables, rivals_table, rivals_together, scorers_page  # noqa: E402 - it lies beside this file

project = "secateur"
author = "the secateur contributors"
release = version = installed("secateur")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build", "generated/rivals*.md", "generated/all_texts.md", "generated/mutation.md"]
html_theme = "furo"
html_title = f"secateur {version}"
html_static_path: list[str] = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Docstrings write code in single backticks.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def write_generated(app: object) -> None:
    """Write the pages that follow from the code, so that they are never older than it."""
    folder = HERE / "generated"
    folder.mkdir(exist_ok=True)
    pages = {
        "scorers.md": scorers_page(),
        "api.md": api_page(),
        "rivals.md": rivals_table("rivals"),
        "rivals_mnli_qnli.md": rivals_table("rivals_mnli_qnli"),
        "rivals_together.md": rivals_together(),
        "all_texts.md": all_texts_table(),
        "mutation.md": mutation_tables(),
    }
    for name, text in pages.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def link_outside(app: object, page: str, source: list[str]) -> None:
    """Let links to files of the repository, which work where it is browsed, hand out the file here."""
    folder = (HERE / page).parent

    def linked(match: re.Match[str]) -> str:
        text, place = match[1], match[2]
        target = (folder / place).resolve()
        if target.is_relative_to(HERE) or not target.exists():
            return match[0]
        return f"{text} (`{target.name}/`)" if target.is_dir() else f"{{download}}`{text} <{place}>`"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)", linked, source[0])


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_generated)  # type: ignore[attr-defined]
    app.connect("source-read", link_outside)  # type: ignore[attr-defined]
