"""What a user installs: every package with its version, why it is there, and its licence.

    .venv-plain/bin/python benchmarks/installed.py LICENCES

`make audit` runs it in the environment in question, on what `pip-licenses --format=json` found there. Our own
requirements say in pyproject.toml what they are for, and all others are brought by them. Ends with exit code 1 where
a package is there that nothing needs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "demo-requirements.txt"
OF_THE_ENVIRONMENT = {"pip", "setuptools", "wheel", "secateur"}
"""Packages that may be there without being needed."""


def named(requirement: str) -> str:
    """Return the package that a requirement is for, as indexes spell it."""
    return canonicalize_name(Requirement(requirement).name)


def reasons() -> dict[str, str]:
    """Return what each of our own requirements is for, as the comment beside it says."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return {named(package): why for package, why in re.findall(r'^ *"(.+)", +# (.+)$', block[1], re.MULTILINE)}


def needed_by(installed: Mapping[str, Iterable[str]], root: str = "secateur") -> dict[str, set[str]]:
    """Return who asks for each package that `root` needs, given what every installed package requires."""
    found: dict[str, set[str]] = {}
    ahead, seen = [(root, "")], set()
    while ahead:
        package, extra = ahead.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        for requirement in map(Requirement, installed.get(package, ())):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                name = canonicalize_name(requirement.name)
                found.setdefault(name, set()).add(package)
                ahead += [(name, wanted) for wanted in ("", *requirement.extras)]
    return found


def table(licences: list[dict[str, str]], installed: Mapping[str, Iterable[str]]) -> list[tuple[str, str, str, str]]:
    """Return name, version, reason and licence of each package but those that came with the environment.

    A package that nothing needs has an empty reason.
    """
    ours, brought = reasons(), needed_by(installed)
    data = {named(line.partition(" ")[0]) for line in DATA.read_text().splitlines() if not line.startswith("#")}
    rows = []
    for one in licences:
        name = canonicalize_name(one["Name"])
        if name in ours:
            why = ours[name]
        elif name in brought:
            why = f"by {', '.join(sorted(brought[name]))}"
        else:
            why = "data of the demo and the tests" if name in data else ""
        if why or name not in OF_THE_ENVIRONMENT:
            rows.append((name, one["Version"], why, one["License"]))
    return sorted(rows, key=lambda row: (row[0] not in ours, row))


def main() -> None:
    installed = {canonicalize_name(one.metadata["Name"]): one.requires or [] for one in distributions()}
    rows = table(json.loads(Path(sys.argv[1]).read_text()), installed)
    lines = [("package", "version", "why", "licence"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    useless = [name for name, _, why, _ in rows if not why]
    if useless:
        sys.exit(f"nothing needs {', '.join(useless)}")


if __name__ == "__main__":
    main()
