"""Files that appear whole or not at all, and the checks of a folder before anything is computed for it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import InvalidInputError, invalid


def write_text(path: str | Path, text: str) -> None:
    """Write through a temporary file beside `path`, then rename, so that no reader sees half a file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write as `write_text` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `InvalidInputError` where it is absent, no file, or no JSON."""
    path = Path(path)
    if not path.is_file():
        raise invalid("path", "name a JSON file that exists", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"{path} is no JSON file: {error}") from None


def append_line(path: str | Path, row: Any) -> None:
    """Append `row` as one JSON line that is on the disk when this returns; half a line that a kill left goes first."""
    path = Path(path)
    whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    with path.open("r+b" if path.is_file() else "wb") as file:
        file.truncate(whole)
        file.seek(whole)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[Any]:
    """Read what `append_line` wrote: nothing where there is no file, and without half a line that a kill left.

    Raises `InvalidInputError` for a whole line that is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InvalidInputError(f"{path}, line {number} is no JSON: {error}") from None
    return rows


def check_new_folder(path: str | Path) -> Path:
    """Return `path` where it is absent or an empty folder, or raise `InvalidInputError`: results do not mix."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise invalid("out", "be a new or empty folder", str(path), "choose another folder or empty this one")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a hidden sibling folder and rename it to `path` at the end; after an exception nothing is left.

    Raises `InvalidInputError` where `path` is a file or a folder with something in it.
    """
    path = check_new_folder(path)
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        if path.exists():
            path.rmdir()
        os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
