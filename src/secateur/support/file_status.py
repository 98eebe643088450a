"""What stands at a place: whether it may be replaced, and the mode and owner that it hands on."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from secateur.errors import invalid


def status(path: Path) -> os.stat_result | None:
    """Return what stands at `path` or, for a link, at its target; None where there is nothing yet."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISBLK(found.st_mode):
        raise invalid("path", "name no disk, of which the file systems would be lost", str(path), "name a file on it")
    return found


def is_stream(found: os.stat_result | None) -> bool:
    """Is it a pipe, a device or a socket, into which is written, and which no file may replace?"""
    return found is not None and not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode)


def hand_on(there: os.stat_result, handle: int, more: int = 0) -> None:
    """Give an open file the mode, with bits of `more`, and, where we may, the owner of another."""
    new, mode = os.fstat(handle), stat.S_IMODE(there.st_mode) | more
    if stat.S_IMODE(new.st_mode) != mode:
        os.fchmod(handle, mode)
    if (new.st_uid, new.st_gid) != (there.st_uid, there.st_gid):
        with suppress(OSError):  # not root, or root of a container that does not know the owner
            os.fchown(handle, there.st_uid, there.st_gid)


def hand_on_folder(there: Path, new: Path) -> None:
    """Give a folder what `hand_on` gives a file; its owner may write into it all the same."""
    handle = os.open(new, os.O_RDONLY)
    try:
        hand_on(os.stat(there), handle, stat.S_IRWXU)
    finally:
        os.close(handle)
