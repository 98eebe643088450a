"""JSON and YAML of people whom nobody knows: read within bounds, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from secateur.errors import InvalidInputError

DEEPEST = 64
"""Levels of lists and mappings within each other."""

LARGEST_JSON, LARGEST_YAML = 128 * 2**20, 2**20
"""Bytes of a file; scores of every neuron of the largest models take less."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|\\U0000[dD][89a-fA-F]")


def parse_json(text: str | bytes, where: str, **options: Any) -> Any:
    """Return what a JSON text says. `options` go to `json.loads`.

    Raises `InvalidInputError`, which begins with `where`, for what is no JSON, nests too deep, or is no text that UTF-8
    can write.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, **options)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise InvalidInputError(f"{where} is no JSON: {short(error)}") from None
    return _checked(value, text, where)


def read_within(path: Path, largest: int) -> bytes:
    """Return the content of a file. Raises `InvalidInputError` where that has more than `largest` bytes."""
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise InvalidInputError(f"{path} must have at most {largest} bytes; it may be another file than was meant")
    return content


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says, in plain values. Raises `InvalidInputError` as `parse_json` does, and for aliases.

    A few bytes of aliases can stand for more values than any memory holds.
    """
    import yaml

    try:
        text = read_within(path, LARGEST_YAML).decode("utf-8")
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InvalidInputError(f"{path} must have no aliases, got *{event.anchor}; write the value out")
        value = yaml.safe_load(text)
    except RecursionError:
        raise _too_deep(str(path)) from None
    except InvalidInputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInputError(f"{path} is no YAML: {short(error)}") from None
    return _checked(value, text, str(path))


def _checked(value: Any, text: str, where: str) -> Any:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(part, dict | list)
        ]
        if not level:
            break
    else:
        raise _too_deep(where)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"{where} must hold text, got half a character (\\ud800 to \\udfff alone); write the whole one"
            ) from None
    return value


def _too_deep(where: str) -> InvalidInputError:
    return InvalidInputError(f"{where} must nest lists and objects at most {DEEPEST} deep; make it flatter")


def short(error: BaseException) -> str:
    """Return an error's message in one line of at most 200 characters, or its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
