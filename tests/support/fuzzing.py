"""Damaged files, one after the other, for a reader: each is refused in the one form, or read as a whole that is of use.

All cases of a reader run in one process that may take little memory, each for a few seconds at most. A case that ends
otherwise is told with the two numbers that make it again:

    python -c 'from tests.support.readers import *; one(READERS["a mask file"], 123, 456)'
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from secateur.errors import CheckpointError, InvalidInputError, SecateurWarning
from tests.support.damage import damaged_file
from tests.support.processes import outcome_within

MEMORY = 500
"""MiB more than a process that has imported everything."""
SECONDS = 5
"""What a case may take."""

_FEWEST = 5
_NUMBER, _FOUND = ".number", ".found"  # in the folder of the files: the case that is tried, and what came of all


@dataclass(frozen=True)
class Reader:
    """Something that reads files of others.

    `write` makes valid files in a folder, of which one that `damaged` names is damaged in each case. `read` gets the
    folder and the name, reads, and does a little with what it has read. `one_in`: of so many cases it tries one. Where
    `bytes` are not damaged, what the file means is alone: another library reads it. `values` may be put in.
    """

    tried: str
    write: Callable[[Path], object]
    damaged: tuple[str, ...]
    read: Callable[[Path, str], object]
    one_in: int = 1
    values: tuple[Any, ...] = ()
    bytes: bool = True


@dataclass
class Tally:
    """What came of the cases."""

    refused: int = 0
    whole: int = 0

    def __str__(self) -> str:
        total = self.refused + self.whole
        return f"{total:,} cases: {self.refused:,} refused in the one form, {self.whole:,} still whole and followed"


class TooLate(BaseException):
    """A case took too long; no `except Exception` of a reader is to take it for another thing."""


def fuzz(readers: Sequence[Reader], seed: int, count: int, most: float = SECONDS) -> dict[str, Tally]:
    """Try `count` cases of each reader in a process of their own, and return what came of them, by what was tried.

    A case may take `most` seconds.

    Raises `AssertionError` for a case that ends otherwise than it may.
    """
    cases = {reader: max(count // reader.one_in, _FEWEST) for reader in readers}
    with _folder() as folder:
        for number, reader in enumerate(readers):
            (folder / str(number)).mkdir()
            reader.write(folder / str(number))
        try:
            at_most = 60 + most * sum(cases.values())
            kind, text = outcome_within(MEMORY, _try_all, cases, folder, seed, most, seconds=at_most)
        except AssertionError as error:  # killed, as by a fault of the memory or in the middle of a library's loop
            kind, text = type(error).__name__, f"{(folder / _NUMBER).read_text()} of seed {seed}: {error}"
        assert not kind, text
        return {tried: Tally(**counts) for tried, counts in json.loads((folder / _FOUND).read_text()).items()}


def one(reader: Reader, seed: int, number: int) -> bytes:
    """Try one case here, and return what the damaged file holds. Raises what the reader does."""
    with _folder() as folder:
        reader.write(folder)
        name, content = _case(reader, folder, seed, number)
        (folder / name).write_bytes(content)
        reader.read(folder, name)
        return content


@contextmanager
def _folder():
    """Make a folder, in memory where there is such a place: hundreds of thousands of files are written."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


def _case(reader: Reader, folder: Path, seed: int, number: int) -> tuple[str, bytes]:
    random = Random(f"{seed} {number}")
    name = random.choice(reader.damaged)
    return name, damaged_file(name, (folder / name).read_bytes(), random, reader.values, reader.bytes)


def _try_all(cases: dict[Reader, int], folder: Path, seed: int, most: float) -> None:
    signal.signal(signal.SIGALRM, _too_late)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    handle = os.open(folder / _NUMBER, os.O_WRONLY | os.O_CREAT)
    found = {}
    for place, (reader, count) in enumerate(cases.items()):
        tally = Tally()
        for number in range(count):
            os.ftruncate(handle, os.pwrite(handle, f"{reader.tried}, case {number}".encode(), 0))
            refused = _try(reader, folder / str(place), seed, number, most)
            tally.refused, tally.whole = tally.refused + refused, tally.whole + (not refused)
        found[reader.tried] = vars(tally)
    (folder / _FOUND).write_text(json.dumps(found))


def _try(reader: Reader, folder: Path, seed: int, number: int, most: float = SECONDS) -> bool:
    """Return whether the files were refused. Raises `AssertionError` with the case where it ends otherwise."""
    name, content = _case(reader, folder, seed, number)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            refused = _is_refused(reader, folder, name, most)
        others = [one.message for one in warned if not issubclass(one.category, SecateurWarning)]
        assert not others, f"warns: {others[0]}"
    except BaseException as error:
        shown = content if len(content) < 2000 else content[:2000] + b"..."
        text = f"{reader.tried}, case {number} of seed {seed}, {name}: {error!r}"
        raise AssertionError(f"{text}\n{shown!r}") from error
    (folder / name).write_bytes(whole)
    return refused


def _is_refused(reader: Reader, folder: Path, name: str, most: float) -> bool:
    """Return whether the files were refused."""
    signal.setitimer(signal.ITIMER_REAL, most)
    signal.setitimer(signal.ITIMER_PROF, 2 * most)  # ends the process where Python never gets to its handler
    try:
        reader.read(folder, name)
    except TooLate:
        raise TooLate(f"more than {most:g} seconds") from None
    except (InvalidInputError, CheckpointError) as error:
        _check_message(error, folder, name)
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return False


def _check_message(error: Exception, folder: Path, name: str) -> None:
    text = str(error)
    assert text == text.strip() != "", f"no message: {text!r}"
    assert "\n" not in text, f"more than one line: {text!r}"
    assert len(text) < 1000, f"more than 1,000 characters: {text!r}"
    names_it = "`" in text or "'--" in text or "is no " in text or str(folder) in text or Path(name).name in text
    assert names_it, f"names neither a file nor a parameter: {text!r}"


def _too_late(*_: object) -> None:
    raise TooLate
