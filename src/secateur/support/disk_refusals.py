"""What the disk says no to, told from the exceptions of those who write, and said in one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from secateur.errors import WriteError

NOTHING_LEFT = "nothing half-written is left"
# What the disk says no to, whoever was writing; other errors of a folder's contents are those of reading something.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def disk_refusal(error: BaseException | None) -> OSError | None:
    """Return the disk's refusal that an exception, or one that led to it, tells of: in Rust's words, or in numpy's."""
    if isinstance(error, WriteError) or not isinstance(error, Exception):
        return None
    return _told_refusal(error) or disk_refusal(error.__cause__ or error.__context__)


def _told_refusal(error: Exception) -> OSError | None:
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if isinstance(error, OSError):
        return None
    told = re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error))
    number = int(told[1] or told[2]) if told else None
    return OSError(number, os.strerror(number)) if number in _REFUSALS else None


def write_error(path: Path, error: OSError, left: str = NOTHING_LEFT) -> WriteError:
    """Return the one form of such an error, with the path, the reason and what to do."""
    reason = error.strerror or str(error)
    remedy = "; make room there, or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return WriteError(f"{path} cannot be written: {reason}; {left}{remedy}")
