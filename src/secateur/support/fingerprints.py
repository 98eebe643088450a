"""What content is known by, so that work that goes on can tell that its model or its texts have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20  # bytes


def fingerprint(parts: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of bytes, or of what has bytes, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def bytes_of(file: Path) -> Iterator[bytes]:
    """Yield a file's name, its size and its bytes."""
    yield f"{file.name} {file.stat().st_size} ".encode()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            yield chunk
