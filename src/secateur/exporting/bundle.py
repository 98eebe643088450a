"""One Python file out of several modules: the definitions that some names need, as they stand in their sources.

The standalone export ships such a file, so that the code that follows a recipe is written once.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = "secateur"


@dataclass(frozen=True)
class _Definition:
    """A top-level statement, with the comments above it and the docstring below it, and the names that it mentions."""

    module: str
    line: int
    text: str
    mentions: frozenset[str]


def bundle(module: str, names: list[str], packages: Sequence[str] = ()) -> str:
    """Return source code that defines `names` of `module` and everything of this package that they mention.

    Imports of other packages stay, those within the package turn into the definitions that they bring. The package's
    modules must import each other as `from secateur.… import name`, at the top and without renaming, and no two of them
    may define the same name with a different meaning; `ValueError` says where that is not so. `packages` are imported
    as well.
    """
    definitions: dict[str, _Definition] = {}
    imports: dict[str, str] = {}  # name → the module that it is imported from, "" for a whole module
    order: list[str] = []
    _read(module, definitions, imports, order)
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in definitions and name not in wanted:
            wanted.add(name)
            waiting += definitions[name].mentions
    chosen = {definitions[name] for name in wanted}
    used = set().union(*(piece.mentions for piece in chosen)) & set(imports)
    pieces = []
    for source in order:
        here = sorted((piece for piece in chosen if piece.module == source), key=lambda piece: piece.line)
        if here:
            pieces.append(f"# From {source}\n\n\n" + "\n\n\n".join(piece.text for piece in here))
    head = _import_block({name: imports[name] for name in used} | dict.fromkeys(packages, ""))
    return head + "\n\n" + "\n\n\n".join(pieces) + "\n"


def _read(module: str, definitions: dict[str, _Definition], imports: dict[str, str], order: list[str]) -> None:
    """Collect what a module defines and imports, after the modules of the package that it imports."""
    path = importlib.import_module(module).__file__
    assert path is not None  # a module of this package
    text = Path(path).read_text(encoding="utf-8")
    lines, end = text.splitlines(), 0
    body = ast.parse(text).body
    here: list[tuple[str, _Definition]] = []
    for number, node in enumerate(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _read_import(module, node, definitions, imports, order)
        elif defined := _names(node):
            last = node.end_lineno or node.lineno
            following = body[number + 1] if number + 1 < len(body) else None
            if _is_docstring(following) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                last = following.end_lineno or last  # type: ignore[union-attr]
            source = "\n".join(lines[end:last]).strip("\n")
            mentions = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)) - {*defined}
            here += [(name, _Definition(module, node.lineno, source, mentions)) for name in defined]
        elif not _is_docstring(node):
            raise ValueError(f"{module}, line {node.lineno}: only imports and definitions can be bundled")
        end = max(end, node.end_lineno or node.lineno)
    for name, piece in here:
        if name in imports or (name in definitions and definitions[name].module != module):
            raise ValueError(f"{module} and another bundled module both define {name}")
        definitions[name] = piece
    order.append(module)


def _read_import(
    module: str,
    node: ast.Import | ast.ImportFrom,
    definitions: dict[str, _Definition],
    imports: dict[str, str],
    order: list[str],
) -> None:
    source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    if source == "__future__":
        return
    if source.split(".")[0] == _PACKAGE:
        if source not in order:
            _read(source, definitions, imports, order)
        return
    for alias in node.names:
        name = alias.asname or alias.name
        if alias.asname or name.split(".")[0] == _PACKAGE or imports.get(name, source) != source:
            raise ValueError(f"{module}, line {node.lineno}: this import cannot be bundled")
        imports[name] = source


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _is_docstring(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _import_block(used: dict[str, str]) -> str:
    """Write the imports, the standard library's first."""
    by_source: dict[str, list[str]] = {}
    for name, source in used.items():
        by_source.setdefault(source, []).append(name)
    plain = [(name, f"import {name}") for name in sorted(by_source.pop("", []))]
    named = [
        (source, f"from {source} import {', '.join(sorted(names))}") for source, names in sorted(by_source.items())
    ]
    blocks = []
    for standard in (True, False):
        block = [
            text for source, text in plain + named if (source.split(".")[0] in sys.stdlib_module_names) == standard
        ]
        if block:
            blocks.append("\n".join(block))
    return "\n\n".join(["from __future__ import annotations", *blocks])
