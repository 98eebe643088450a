"""The table of docs/robustness.md, written from a test run: what was tried, and what came of it.

A test that asks for the fixture `outcome` adds rows, each after it has checked what it says:

    def test_a_full_disk(outcome, tmp_path):
        with pytest.raises(OSError) as caught: ...
        outcome("Faults while writing", "the disk fills up during `prune`", caught.value)

The last value is a word or a sentence, or the exception that was raised, which is shown as `refused: ` with its
message; the test's `tmp_path` is cut out of it. Rows of one section stand together. Rows of a test that fails do not
count, and a test that is skipped is named under the table with its reason.

`make robustness` runs the tests with that fixture alone and writes the page, if none fails. `--outcomes FILE.json`
writes the rows with date, machine and versions instead. In any other run the fixture fails a test whose row the page
does not have, so that the page is never older than the tests.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
HEAD = """\
# What was tried

{totals}

`make robustness` writes this page from the tests. Each of them checks what its row says. A refusal is an exception that
names the parameter, the rule, the value and the remedy. On the command line it is one line and exit code 2.

- {fuzz}
- {stops}
- {soak}
"""
RESULTS = PAGE.parents[1] / "benchmarks" / "results"
_ROW = "outcome"
_found: dict[str, list[tuple[str, str]]] = {}
_skipped: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "run the tests that say what came of an input or a fault, and write their rows to FILE (.md or .json)"
    parser.addoption("--outcomes", metavar="FILE", type=Path, help=help)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--outcomes"):
        chosen = [item for item in items if _ROW in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, object], None]]:
    """`outcome(section, tried, what came of it)` adds a row to the table."""
    folder = str(request.getfixturevalue("tmp_path")) if "tmp_path" in request.fixturenames else ""
    rows: list[tuple[str, str, str]] = []

    def add(section: str, tried: str, came: object) -> None:
        text = f"refused: {came}" if isinstance(came, BaseException) else str(came)
        text = re.sub(r" at 0x[0-9a-f]+", " at 0x…", text)  # another one each time
        if folder:
            text = text.replace(f"{folder}/", "").replace(folder, "…")
        rows.append((section, tried, text))
        request.node.user_properties.append((_ROW, rows[-1]))

    yield add
    if not request.config.getoption("--outcomes"):
        page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        lost = [tried for _, tried, _ in rows if f"\n| {_cell(tried)} | " not in page]
        assert not lost, f"docs/robustness.md does not have {lost}; write it with `make robustness`"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == _ROW:
                section, tried, came = value
                _found.setdefault(section, []).append((tried, came))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    file = session.config.getoption("--outcomes")
    if file and exitstatus == pytest.ExitCode.OK and not hasattr(session.config, "workerinput"):  # the whole run
        text = _as_json(session.config) if file.suffix == ".json" else _as_page()
        file.write_text(text, encoding="utf-8")


def longer_runs() -> dict[str, str]:
    """Say in a line each what `make fuzz` and `make soak` came to, which take an hour and more."""
    found = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("fuzz", "soak")}
    files = [row["outcome"] for row in found["fuzz"]["rows"] if row["section"] == "Damaged files"]
    tried, refused = (
        sum(int(re.findall(r"[\d,]+", text)[place].replace(",", "")) for text in files) for place in (0, 1)
    )
    ends: dict[str, int] = {}
    for what, count in found["soak"]["tried"].items():
        end = what.rpartition(", ")[2]
        ends[end] = ends.get(end, 0) + count
    rows = [row["memory_mib"] for row in found["soak"]["over_time"]]
    quarter = len(rows) // 4
    grown = statistics.median(rows[-quarter:]) / statistics.median(rows[quarter : 2 * quarter]) - 1
    grew = f"nothing was left behind; memory was {grown:.0%} more in the last quarter than in the second"
    left = "; ".join(found["soak"]["left"]) or grew
    moments = [row["outcome"] for row in found["fuzz"]["rows"] if " moments tried" in row["outcome"]]
    stops = sum(int(text.partition(" ")[0].replace(",", "")) for text in moments)
    return {
        "stops": (
            f"**Ctrl-C** at {stops:,} moments at which {len(moments)} calls enter or leave a context: each left the "
            "model as it was, or the work done whole (`make fuzz`)."
        ),
        "fuzz": (
            f"**Damaged files**: {tried:,} in {len(files)} readers, within limits of memory and time. {refused:,} were "
            f"refused in one line, all others read whole ([raw](../benchmarks/results/fuzz.json), `make fuzz`)."
        ),
        "soak": (
            f"**An hour of use** in random order: {sum(ends.values()):,} calls and commands, {ends['stopped']:,} of "
            f"them stopped by Ctrl-C and {ends['killed']:,} killed. Afterwards {left} "
            f"([raw](../benchmarks/results/soak.json), `make soak`)."
        ),
    }


def _head() -> str:
    tried, refused = (sum(map(count, _found.values())) for count in (len, _refusals))
    totals = (
        f"{tried:,} kinds of wrong inputs and of faults were tried. {refused:,} are refused with the reason, and the "
        "others do no harm."
    )
    return HEAD.format(totals=totals, **longer_runs())


def _as_page() -> str:
    lines = [_head(), *_totals()]
    for section, rows in _found.items():
        lines += [f"## {section}", "", "| tried | what came of it |", "|---|---|"]
        lines += [f"| {_cell(tried)} | {_cell(came)} |" for tried, came in rows]
        lines.append("")
    if _skipped:
        lines += ["## Not tried in this run", ""]
        lines += [f"- `{test}`: {_cell(reason)}" for test, reason in _skipped.items()]
        lines.append("")
    return "\n".join(lines)


def _totals() -> list[str]:
    """Return a table of how much was tried, by section, and how much of it was refused with a reason."""
    rows = [(section, len(found), _refusals(found)) for section, found in _found.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = ["| section | tried | refused, with the reason |", "|---|---:|---:|"]
    return [*lines, *(f"| {section} | {tried:,} | {refused:,} |" for section, tried, refused in rows), ""]


def _refusals(found: list[tuple[str, str]]) -> int:
    return sum(came.startswith(("refused", "secateur: error")) for _, came in found)


def _as_json(config: pytest.Config) -> str:
    from secateur.support.versions import environment

    facts = {
        "command": " ".join(["python -m pytest", *config.invocation_params.args]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": environment(),
    }
    rows = [{"section": s, "tried": t, "outcome": o} for s, found in _found.items() for t, o in found]
    return json.dumps({**facts, "rows": rows, "skipped": _skipped}, indent=1) + "\n"


def _cell(text: str) -> str:
    """Fit a text into one cell of a Markdown table, where nothing of it is markup but backticks."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    line = (line if len(line) <= 300 else line[:297] + "...").replace("|", "\\|")
    parts = line.split("`")
    if len(parts) % 2 == 0:  # a backtick alone
        return line.replace("`", "'").replace("<", "&lt;")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))
