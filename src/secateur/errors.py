"""What a caller may catch. Every message names the thing, the rule, the value and, where there is one, the remedy."""

from __future__ import annotations


class SecateurError(Exception):
    """Base of every error that secateur raises on purpose; the command line prints it in one line and exits with 2."""


class InvalidInputError(SecateurError, ValueError):
    """A parameter, file or mask breaks a rule that the message names."""


class UnsupportedModelError(SecateurError):
    """The model has attention that cannot be read or removed safely; the message names the site and the reason."""


class RemovalError(SecateurError):
    """The smaller model was not equal to the gated one; the model has been put back as it was."""


class CheckpointError(SecateurError, ValueError):
    """A `head_pruning` recipe in a `config.json` cannot be followed."""


class WriteError(SecateurError, OSError):
    """The disk does not take a result: it is full, read-only or not ours; nothing half-written is left."""


class OutOfMemoryError(SecateurError, MemoryError):
    """Not even a batch of one text fits into memory."""


class SecateurWarning(UserWarning):
    """Something that a person should know and that stops nothing, such as batches that were halved."""


def invalid(name: str, rule: str, value: object, remedy: str = "") -> InvalidInputError:
    """Build the one form of input error: `` `name` must rule, got value. Remedy. ``."""
    return InvalidInputError(f"`{name}` must {rule}, got {shown(value)}" + (f"; {remedy}" if remedy else ""))


def shown(value: object, length: int = 80) -> str:
    """Return how messages show a value: its `repr`, cut to `length` characters, or to four times as many for a path.

    The end of a path is what tells it from others.
    """
    text = repr(value)
    is_path = isinstance(value, str) and "/" in value and "\n" not in value
    most = 4 * length if is_path else length
    return text if len(text) <= most else text[: length - 3] + "..."
