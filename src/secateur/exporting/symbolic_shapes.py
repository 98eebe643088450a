"""What torch keeps of an export's symbolic shapes for as long as the process lives, let go of.

A `ShapeEnv` holds tensors whose sizes hold it, by way of C++, where no garbage collector looks; caches of its methods
hold it too. That is some 17,000 objects an export.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from secateur.support.interrupts import undoing

_lock = threading.Lock()
_threads: dict[int, list[ShapeEnv]] = {}  # those that export → what they made
_constructor: Any = ShapeEnv.__init__


def _noting(self: ShapeEnv, *args: Any, **kwargs: Any) -> None:
    _threads.get(threading.get_ident(), []).append(self)
    _constructor(self, *args, **kwargs)


@undoing
def symbolic_shapes_forgotten() -> Iterator[None]:
    """Let go at the end of all that torch learns of symbolic shapes meanwhile, in this thread."""
    thread = threading.get_ident()
    with _lock:
        _threads[thread] = []
        ShapeEnv.__init__ = _noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            made = _threads.pop(thread)
            if not _threads:
                ShapeEnv.__init__ = _constructor  # type: ignore[method-assign]
        for one in made:
            one.tracked_fakes = None
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
