"""Sharing work among the processes of `accelerate launch`, so that results do not depend on how many there are.

Items go to the processes in turn, whole, and every process gets every item's result in the items' order. What is then
added up is added up in the order of one process, so it comes out the same to the last bit. A round of results, one
from each process, is held at a time: neither memory nor what is sent at once grows with the number of items.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")


_being_made = threading.Lock()


def own_accelerator() -> Accelerator:
    """Return a new one. accelerate empties the environment and puts it back, so threads wait for each other."""
    with _being_made:
        return Accelerator()


def in_order(
    compute: Callable[[Item], Result], items: Iterable[Item], accelerator: Accelerator | None = None
) -> Iterator[Result]:
    """Yield `compute(item)` for each item, in order and on every process; each computes its share of them.

    All processes must be given the same items and stop reading at the same result. Results travel between processes:
    tensors in them must lie on the CPU.
    """
    if accelerator is None or not is_shared(accelerator):
        yield from map(compute, items)
        return
    rank, count, left = accelerator.process_index, accelerator.num_processes, iter(items)
    while turn := list(islice(left, count)):
        yield from gather_object([compute(item) for item in turn[rank : rank + 1]])


def from_main(compute: Callable[[], Result], accelerator: Accelerator | None = None) -> Result:
    """Return on every process what the main process computes: one verdict, whatever the others would have rounded."""
    if accelerator is None or not is_shared(accelerator):
        return compute()
    return broadcast_object_list([compute() if accelerator.is_main_process else None])[0]


def is_shared(accelerator: Accelerator | None) -> bool:
    """Return whether there are other processes to share work with."""
    return accelerator is not None and accelerator.num_processes > 1
