"""The sdist and the wheel, built twice: they must be the same bytes, wherever and whenever somebody builds them.

    python benchmarks/distributions.py

First from this folder, into dist/, then from the unpacked sdist: in another folder, with other times and modes of its
files, and under another umask, time zone, locale and order of sets. Prints the SHA-256 of both. Ends with exit code 1
where the second build differs, or where the sdist has a file that git does not know.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"


def build(source: Path, out: Path, umask: int, **environment: str) -> list[Path]:
    """Build what lies in `source` and return the sdist and the wheel in `out`."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    subprocess.run(command, cwd=source, env={**os.environ, "HATCH_QUIET": "1", **environment}, umask=umask, check=True)
    return [*out.glob("*.tar.gz"), *out.glob("*.whl")]


def tracked() -> set[str] | None:
    """Return the files of the repository that git knows, or None in an unpacked sdist, where there is no git."""
    if not (ROOT / ".git").exists():
        return None
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def contents(sdist: Path) -> set[str]:
    """Return the files of an sdist, but for what its builder adds."""
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    first = build(ROOT, DIST, 0o022, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="1")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(first[0]) as archive:
            archive.extractall(folder, filter="data")
        source = Path(folder, first[0].name.removesuffix(".tar.gz"))
        for path in source.rglob("*"):
            path.chmod(path.stat().st_mode & 0o700)
            path.touch()
        second = build(source, source / "dist", 0o077, TZ="Asia/Tokyo", LC_ALL="C.UTF-8", PYTHONHASHSEED="2")
        differing = [a.name for a, b in zip(first, second, strict=True) if a.read_bytes() != b.read_bytes()]
    for path in first:
        print(f"{sha256(path.read_bytes()).hexdigest()}  dist/{path.name}")
    if differing:
        sys.exit(f"built again, it is not the same: {', '.join(differing)}")
    known = tracked()
    if known is not None and (unknown := contents(first[0]) - known):
        sys.exit(f"git does not know what the sdist has; add, ignore or remove it: {', '.join(sorted(unknown))}")


if __name__ == "__main__":
    main()
