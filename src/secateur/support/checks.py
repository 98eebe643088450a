"""What arguments must be that many functions share, each refused in the one form of errors."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import InvalidInputError, invalid

LARGEST_SEED = 2**32 - 1
"""What every library that draws random numbers here takes."""
_MADE_UP = 2  # tokens besides the special ones, at most, of a tokenizer without a vocabulary: DeBERTa's


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return "did you mean …?" with the name among `known` that is nearest, empty where none is near."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else ""


def nearest(name: str, known: Collection[str]) -> str:
    """Return the name among `known` that one may have meant: one of which it is a word, or else one spelled alike."""
    words = [one for one in known if name in one.split("_")]
    return next(iter(words or difflib.get_close_matches(name, known, 1)), "")


def is_number(value: Any, *, least: float = -math.inf, above: float = -math.inf) -> bool:
    """Return whether a value is a finite number, of a size that a float can have, in its range."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max and value >= least and value > above


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise `InvalidInputError` unless `value` is a whole number from `least`, up to `most` where that is given."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        raise invalid(name, f"be a whole number from {least}" + (f" to {most}" if most is not None else ""), value)


def check_seed(value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is a seed."""
    check_whole("seed", value, 0, LARGEST_SEED)


def check_positive(name: str, value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is a finite number above 0."""
    if not is_number(value, above=0):
        raise invalid(name, "be a number above 0", value)


def check_flag(name: str, value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise invalid(name, "be True or False", value)


def check_mapping(name: str, value: Any, rule: str = "be a mapping from names with at least one entry") -> None:
    """Raise `InvalidInputError` unless `value` is a mapping from texts that has an entry."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        raise invalid(name, rule, value)


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a path, or raise `InvalidInputError` unless it names one."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise invalid(name, "be a path", value)
    return Path(value)


def check_tokenizer(value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is called like a tokenizer of transformers, and knows words."""
    if not callable(value) or not hasattr(value, "pad_token"):
        raise invalid("tokenizer", "be a tokenizer of transformers", value)
    if not knows_words(value):
        raise InvalidInputError(
            f"`tokenizer` must know words, got {type(value).__name__} of {len(value)} tokens; transformers makes such "
            "a one up for a folder without tokenizer files: load the original's"
        )


def knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has more tokens than the special ones.

    Those that transformers makes up without a vocabulary have them, the mark of a space perhaps, and no more.
    """
    if not hasattr(tokenizer, "added_tokens_decoder"):
        return True
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return len(tokenizer) - len(special.union(tokenizer.all_special_ids)) > _MADE_UP


def check_accelerator(value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is None or knows its processes, as an `Accelerator` does."""
    if value is not None and not hasattr(value, "num_processes"):
        raise invalid("accelerator", "be an Accelerator or None", value)
