"""A batch that does not fit into memory: the same work again, in batches of half as many texts, and a word about it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from secateur.errors import OutOfMemoryError, SecateurWarning

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Does the exception tell of memory, of a GPU's or this machine's, that there is not enough of?"""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def halves_batches(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function with a keyword `batch_size` start again with half of it where a batch does not fit into memory.

    From the start, so that what it returns is what the smaller batch gives, also where texts of a batch are compared
    with each other. Each time it issues a `SecateurWarning`. It raises `OutOfMemoryError` where a single text does not
    fit, where the caller made the batches, where texts come one after the other and cannot be read again, and where
    other processes would not know of it.
    """
    default = (function.__kwdefaults__ or {})["batch_size"]
    signature = inspect.signature(function)

    @functools.wraps(function)
    def halving(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        while True:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:150]
            # The exception is gone here, and with it the tensors of the pass that it came from.
            clear_device_cache(garbage_collection=True)
            size: int = kwargs.get("batch_size", default)  # type: ignore[assignment]
            if kwargs.get("inputs") is not None:
                raise OutOfMemoryError(f"a batch of `inputs` does not fit into memory; make smaller ones ({reason})")
            texts = signature.bind(*args, **kwargs).arguments.get("texts")
            is_stream = texts is not None and not isinstance(texts, Sequence) and not hasattr(texts, "__array__")
            if size <= 1:
                raise OutOfMemoryError(f"one text does not fit into memory; lower `max_length` ({reason})")
            if is_stream or getattr(kwargs.get("accelerator"), "num_processes", 1) > 1:
                raise OutOfMemoryError(f"`batch_size` must be smaller than {size} to fit into memory ({reason})")
            message = f"a batch of {size} texts does not fit into memory; starting again with {size // 2} a batch"
            warnings.warn(message, SecateurWarning, stacklevel=2)
            kwargs["batch_size"] = size // 2

    return halving
