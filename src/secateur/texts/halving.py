"""A batch that does not fit into memory: the same work again, in batches of half as many texts, and a word about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from secateur.errors import OutOfMemoryError, SecateurWarning
from secateur.settings import Reading
from secateur.support.processes import is_shared

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Does the exception tell of memory, of a GPU's or this machine's, that there is not enough of?"""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def in_batches_that_fit(run: Callable[[Reading], Result], reading: Reading, cannot_repeat: str = "") -> Result:
    """Return `run(reading)`, or, while a batch does not fit into memory, what it returns with half the batch size.

    From the start, so that the result is what the smaller batch gives, also where texts of a batch are compared with
    each other. Each time it issues a `SecateurWarning`. It raises `OutOfMemoryError` where a single text does not fit,
    where other processes would not know of it, and where the work cannot be done again, as `cannot_repeat` explains.
    """
    while True:
        try:
            return run(reading)
        except Exception as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:150]
        # The exception is gone here, and with it the tensors of the pass that it came from.
        clear_device_cache(garbage_collection=True)
        size = reading.batch_size
        if cannot_repeat:
            raise OutOfMemoryError(f"{cannot_repeat} ({reason})")
        if size <= 1:
            raise OutOfMemoryError(f"one text does not fit into memory; lower `max_length` ({reason})")
        if is_shared(reading.accelerator):
            raise OutOfMemoryError(f"{smaller_batches(size)} ({reason})")
        message = f"a batch of {size} texts does not fit into memory; starting again with {size // 2} a batch"
        warnings.warn(message, SecateurWarning, stacklevel=3)
        reading = reading.with_batches_of(size // 2)


def smaller_batches(size: int) -> str:
    """Say that the caller must lower the batch size."""
    return f"`batch_size` must be smaller than {size} to fit into memory"
