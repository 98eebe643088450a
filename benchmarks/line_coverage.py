"""What `make coverage` measured, file by file: percent of lines and how many are missing.

    python benchmarks/line_coverage.py

Reads .coverage, which the tests left, and writes benchmarks/results/coverage.json.
"""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coverage import Coverage

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "coverage.json"
PACKAGES = ("secateur", "torch", "transformers", "pytest", "pytest-cov", "coverage")


def _numbers(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "percent": round(summary["percent_covered"], 2),
        "lines": summary["num_statements"],
        "missing": summary["missing_lines"],
    }


def main() -> None:
    measured = Coverage(config_file=ROOT / "pyproject.toml")
    measured.load()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        measured.json_report(outfile=file.name)
        report = json.load(file)
    result = {
        "command": "make coverage",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in PACKAGES},
        "total": _numbers(report["totals"]),
        "files": {
            name.removeprefix("src/secateur/"): _numbers(one["summary"]) for name, one in report["files"].items()
        },
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
