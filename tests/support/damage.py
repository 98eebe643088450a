"""Damaged copies of files, for tests that ask what is refused. Whoever draws with the same numbers gets the same ones.

What a file means is damaged as often as its bytes are: places of JSON, of lines of JSON, of YAML, and of the header of
a safetensors file are changed, dropped, added or renamed, what is compressed is damaged inside too.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 0.5, 10**6, 10**30, 10**400, 1e999, -1e999, math.nan, 1e308, 5e-324, "", "x", "1x2",
    "-x3", "0x1000000 " * 3, "9" * 5000, "a.b", "../../x", "__class__", "<script>alert(1)</script>", "\ud800", "\0",
    "x\ny", [], {}, [0], [[0]], ["x"], [None], {"a": 1}, {"0": [0]},
]  # fmt: skip
"""Values of another type, out of range, empty, too large, and with a meaning elsewhere."""

_ENDS = 4096  # bytes
_LENGTH = 8  # bytes of a safetensors file that say how long its header is


def damaged_file(
    name: str, content: bytes, random: Random, extra: tuple[Any, ...] = (), in_bytes: bool = True
) -> bytes:
    """Return the content of a file with some damage, a quarter of it `in_bytes`; `extra` goes in as `ODD` does."""
    if in_bytes and random.randrange(4) == 0:
        return damaged_bytes(content, random)
    if name.endswith(".gz"):
        return gzip.compress(damaged_file(name.removesuffix(".gz"), gzip.decompress(content), random, extra), 1)
    for ending, damage in _FORMS.items():
        if name.endswith(ending):
            return damage(content, random, extra)
    return damaged_bytes(content, random)


def damaged(document: Any, random: Random, extra: tuple[Any, ...] = ()) -> Any:
    """Return JSON data with one to three places changed; now and then it is another thing altogether."""
    values = (*ODD, *extra)
    if random.randrange(64) == 0:
        return copy.deepcopy(random.choice(values))
    made = copy.deepcopy(document)
    for _ in range(random.randint(1, 3)):
        places = list(_places(made, random.randint(1, 8))) or list(_places(made, 1))
        new = copy.deepcopy(random.choice(values))
        if not places:
            return new
        holder, key = random.choice(places)
        kind = random.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, new)
        elif kind == 1:
            holder[str(new)] = holder.pop(key)
        else:
            holder[key] = new
    return made


def _places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Yield the holders and keys of what lies `depth` steps inside `value`."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys:
        if depth == 1:
            yield value, key
        else:
            yield from _places(value[key], depth - 1)


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """Return bytes with a few changed, put in or taken out, with a piece moved or doubled, or cut short."""
    at, length = _somewhere(content, random), random.randint(1, 8)
    kind = random.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + length :]
    if kind == 2:
        return content[:at] + random.randbytes(length) + content[at:]
    if kind == 3:  # a piece from elsewhere
        other = random.randint(0, len(content))
        piece = content[other : other + random.choice((length, 64, len(content)))]
        return content[:at] + piece + content[at + random.choice((0, len(piece))) :]
    made = bytearray(content)
    for _ in range(random.randint(1, 3) if made else 0):
        place = min(_somewhere(content, random), len(made) - 1)
        made[place] = random.randrange(256) if kind == 4 else made[place] ^ 1 << random.randrange(8)
    return bytes(made)


def _somewhere(content: bytes, random: Random) -> int:
    """Return a place in the content, half of the time near one of its ends, where formats say what is where."""
    size = len(content)
    near = random.randint(0, min(_ENDS, size))
    return random.choice((near, size - near, random.randint(0, size), random.randint(0, size)))


def _json(content: bytes, random: Random, extra: tuple[Any, ...]) -> bytes:
    return json.dumps(damaged(json.loads(content), random, extra)).encode()


def _lines(content: bytes, random: Random, extra: tuple[Any, ...]) -> bytes:
    rows = damaged([json.loads(line) for line in content.splitlines()], random, extra)
    return "".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])).encode()


def _header(content: bytes, random: Random, extra: tuple[Any, ...]) -> bytes:
    """Damage the header of a safetensors file, and the JSON that texts of its metadata hold; or what it says is its
    length.
    """
    size = int.from_bytes(content[:_LENGTH], "little")
    text, rest = content[_LENGTH : _LENGTH + size], content[_LENGTH + size :]
    if random.randrange(16) == 0:
        size = random.choice((0, size - 1, size + 1, len(content), 2**31, 2**63, random.randrange(2**64)))
        return size.to_bytes(_LENGTH, "little") + text + rest
    header = json.loads(text)
    about = header.get("__metadata__", {})
    about |= {name: json.loads(value) for name, value in about.items() if value[:1] in "[{"}
    made = damaged(header, random, extra)
    about = made.get("__metadata__") if isinstance(made, dict) else None
    if isinstance(about, dict):
        about |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    text = json.dumps(made).encode()
    return len(text).to_bytes(_LENGTH, "little") + text + rest


_FORMS: dict[str, Callable[[bytes, Random, tuple[Any, ...]], bytes]] = {
    ".json": _json, ".jsonl": _lines, ".yaml": _json, ".safetensors": _header,
}  # fmt: skip
"""How a file is damaged by its ending; JSON is YAML too."""
