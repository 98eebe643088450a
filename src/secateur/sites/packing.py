"""Which of thousands of units stay, in few characters."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence

_BITS = "base64:"


def pack(units: Sequence[int]) -> str:
    """Write increasing numbers as ranges, "0:12 14 20:32" without the ends, or as bits in base64 if shorter."""
    runs = " ".join(f"{first}:{last + 1}" if last > first else str(first) for first, last in _runs(units))
    bits = bytearray(units[-1] // 8 + 1 if units else 0)
    for unit in units:
        bits[unit // 8] |= 128 >> unit % 8
    packed = _BITS + base64.b64encode(bits).decode()
    return min(runs, packed, key=len)


def unpack(text: str, count: int) -> tuple[int, ...]:
    """Read what `pack` wrote of `count` units. Raises `ValueError` for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"kept units must be a text, got {type(text).__name__}")
    if text.startswith(_BITS):
        data = base64.b64decode(text.removeprefix(_BITS), validate=True)
        if len(data) > (count + 7) // 8:
            raise ValueError(f"bits for more than {count} units")
        units = [8 * place + bit for place, byte in enumerate(data) for bit in range(8) if byte & 128 >> bit]
        if units and units[-1] >= count:
            raise ValueError(f"unit {units[-1]} of {count}")
        return tuple(units)
    found: list[int] = []
    for run in text.split():
        first, _, end = run.partition(":")
        numbers = range(int(first), int(end) if end else int(first) + 1)
        if not numbers or numbers[0] < (found[-1] + 1 if found else 0) or numbers[-1] >= count:
            raise ValueError(f"impossible run {run!r} among {count} units")
        found += numbers
    return tuple(found)


def _runs(units: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for unit in units:
        if last is not None and unit == last + 1:
            last = unit
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = unit
    if first is not None and last is not None:
        yield first, last
