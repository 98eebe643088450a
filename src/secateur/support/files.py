"""Files and folders that appear whole or not at all, whatever ends the run that writes them.

Everything is written beside its place under a hidden name (a folder: `.NAME.unfinished`), brought to the disk, and
renamed. So a reader, also one after a kill or a power cut, finds what was there before or what is there now. A link
stays one, and what is replaced hands on its mode; pipes and devices are written to and never replaced.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from secateur.errors import SecateurWarning, WriteError, invalid
from secateur.support.disk_refusals import NOTHING_LEFT, disk_refusal, write_error
from secateur.support.file_status import hand_on, hand_on_folder, is_stream, status
from secateur.support.interrupts import undoing
from secateur.support.parsing import LARGEST_JSON, parse_json, read_within

LOCK = ".lock"
"""The file in a folder that grows with the work, which a run holds meanwhile."""

_UNFINISHED = "unfinished"


def write_text(path: str | Path, text: str) -> None:
    """Write through a temporary file beside `path`, then rename, so that no reader sees half a file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write as `write_text` does, to the target where `path` is a link; into a pipe or a device as it stands.

    Raises `WriteError`, and leaves what was there, where the disk does not take it, and `InvalidInputError` for a disk.
    """
    path, left = Path(path), NOTHING_LEFT
    try:
        there = status(path)
        if is_stream(there):
            left = "a part of it may have gone in"
            _write_through(path, content)
        else:
            _replace(Path(os.path.realpath(path)), there, content)
    except OSError as error:
        raise write_error(path, error, left) from error


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files as `write_bytes` does, all or none: each is on the disk before the first takes its place.

    Raises what `write_bytes` raises.
    """
    path, waiting, new = Path(), [], []
    try:
        for path, content in files.items():
            if not is_stream(there := status(path)):
                target = Path(os.path.realpath(path))
                new += [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
                waiting.append((_beside(target, there, content), target))
        for temporary, target in waiting:
            os.replace(temporary, target)
            _sync(target.parent)
    except BaseException as error:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise
    for path, content in files.items():
        if is_stream(status(path)):
            write_bytes(path, content)


def _replace(path: Path, there: os.stat_result | None, content: bytes) -> None:
    """Put a file with the content in the place of the one that is `there`."""
    temporary = _beside(path, there, content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _beside(path: Path, there: os.stat_result | None, content: bytes) -> Path:
    """Bring the content to the disk under a hidden name beside `path`, and return that."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{_UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            if there is not None:
                hand_on(there, file.fileno())  # before there is anything in it that others could read
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_through(path: Path, content: bytes) -> None:
    """Write into what stands at `path`. It cannot be replaced, so a reader may see a part."""
    # A pipe waits for its reader here, as it does everywhere.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY), "wb") as file:
        file.write(content)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises `InvalidInputError` where it is absent, no file, or not what `parse_json` takes."""
    path = Path(path)
    if not path.is_file():
        raise invalid("path", "name a JSON file that exists", str(path))
    return parse_json(read_within(path, LARGEST_JSON), str(path))


def append_line(path: str | Path, row: Any) -> None:
    """Append `row` as one JSON line that is on the disk when this returns; half a line that a kill left goes first.

    Raises `WriteError`, and leaves the lines that were there, where the disk does not take it.
    """
    path, whole = Path(path), None
    line = json.dumps(row).encode() + b"\n"
    is_new = not path.is_file()
    try:
        with path.open("xb" if is_new else "r+b") as file:
            whole = _end_of_lines(file)
            file.truncate(whole)
            file.seek(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            _sync(path.parent)
    except OSError as error:
        if whole is not None:  # else it could not even be read
            with suppress(OSError):
                os.truncate(path, whole)
        raise write_error(path, error) from error


def read_lines(path: str | Path) -> list[Any]:
    """Read what `append_line` wrote: nothing where there is no file, and without half a line that a kill left.

    Raises `InvalidInputError` for a whole line that is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = read_within(path, LARGEST_JSON).split(b"\n")[:-1]
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def check_new_folder(path: str | Path) -> Path:
    """Return `path` where it is absent or an empty folder that can be replaced, or raise `InvalidInputError`.

    Results do not mix. A mount point cannot be replaced, and a shell in a folder that was is nowhere.
    """
    path = Path(path)
    try:
        status(path)
    except OSError as error:  # a link to itself, or a file in the place of a folder above it
        raise write_error(path, error) from error
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise invalid("out", "be a new or empty folder", str(path), "choose another folder or empty this one")
    if path.is_dir() and (path.is_mount() or _here().is_relative_to(path.resolve())):
        rule = "be neither a mount point nor the folder that this runs in"
        raise invalid("out", rule, str(path), "name a new folder inside it")
    return path


def _here() -> Path:
    """Return the folder that this runs in, or a place of its own where that has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path()


def is_taken(path: Path) -> bool:
    """Is `path` a file, or a folder with more in it than what a run leaves that was killed as soon as it held it?"""
    if not path.is_dir():
        return path.exists()
    return any(inside.name != LOCK and not inside.name.endswith(f".{_UNFINISHED}") for inside in path.iterdir())


def check_can_write(path: str | Path) -> None:
    """Raise `WriteError` where `write_bytes` could not write `path`: to be found out before the work, not after it."""
    path = Path(path)
    try:
        stream = is_stream(status(path))
    except OSError as error:
        raise write_error(path, error) from error
    place = path if stream else Path(os.path.realpath(path)).parent
    if not os.access(place, os.W_OK if stream else os.W_OK | os.X_OK):
        raise WriteError(f"{place} cannot be written to; choose another place, or get permission to write there")


@undoing
def one_run(lock: Path, out: str | Path) -> Iterator[None]:
    """Hold the file `lock`, made with its folder, meanwhile: only one run can, and a killed one holds nothing.

    Raises `InvalidInputError` where another run, in another process or thread, holds it for its results in `out`, and
    `WriteError` where it cannot be made.
    """
    held = FileLock(lock, timeout=0)
    try:
        status(lock)  # says what is wrong where `mkdir` says "File exists"
        Path(os.path.realpath(lock.parent)).mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise invalid("out", "be written by one run at a time", str(out), "wait for the other one to end") from None
    except OSError as error:
        raise write_error(Path(out), error) from error
    try:
        yield
    finally:
        held.release()


@undoing
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a hidden sibling folder and rename it to `path` at the end; after an exception nothing is left.

    To be entered before the work whose results it gets: a folder that cannot be written to, or that another run is
    about to write, is refused at once.

    Raises `InvalidInputError` where `path` is a file, a folder with something in it or another run's, and `WriteError`
    where the disk does not take what is written.
    """
    place = Path(os.path.realpath(path))
    lock = place.with_name(f".{place.name}.lock")
    with one_run(lock, path):
        try:
            check_new_folder(path)
            with _staged(place, path) as staging:
                yield staging
                check_new_folder(path)  # nobody but a run heeds the lock
        finally:
            lock.unlink(missing_ok=True)  # still held, so that nobody else holds what is unlinked


@undoing
def replaced_folder(path: Path) -> Iterator[Path]:
    """Do what `new_folder` does, in a folder that the caller holds, and put the result in the place of an older one."""
    with _staged(path, path) as staging:
        yield staging
        remove_folder(path)


@undoing
def _staged(place: Path, shown: str | Path) -> Iterator[Path]:
    staging = place.with_name(f".{place.name}.{_UNFINISHED}")
    try:
        if staging.exists():
            _remove(staging)
            message = f"removed {staging}, which a run that was killed had not finished"
            warnings.warn(message, SecateurWarning, stacklevel=5)
        staging.mkdir()
        if place.is_dir():
            hand_on_folder(place, staging)
        yield staging
        _sync_all(staging)
        os.replace(staging, place)
        _sync(place.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        refused = disk_refusal(error)
        if refused is None:
            raise
        raise write_error(Path(shown), refused) from error


@undoing
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that goes at the end, also where Ctrl-C comes while it is made or removed."""
    with TemporaryDirectory(prefix="secateur-") as folder:
        yield Path(folder)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves nothing that looks like it: it loses its name first."""
    if path.exists():
        going = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{_UNFINISHED}")
        os.replace(path, going)
        _remove(going)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed runs left in `folder`, of which the caller is sure to be the only run."""
    for path in Path(folder).rglob(f".*.{_UNFINISHED}"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(folder: Path) -> None:
    """Bring a folder and everything in it to the disk: a rename may get there before what was written."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _end_of_lines(file: Any) -> int:
    """Return where the last whole line of an open file ends."""
    size: int = file.seek(0, os.SEEK_END)
    if not size:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return int(file.read().rfind(b"\n")) + 1
