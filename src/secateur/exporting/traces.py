"""What torch keeps of an export for as long as the process lives, let go of.

A `ShapeEnv` holds tensors whose sizes hold it, by way of C++, where no garbage collector looks; caches of its methods
hold it too: some 17,000 objects an export. The Python code that torch generates from each graph stays for tracebacks,
400 kB an export of the smallest model.
"""

from __future__ import annotations

import linecache
import threading
from collections.abc import Iterator
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader as _sources

from secateur.support.interrupts import undoing

_lock = threading.Lock()
_threads: dict[int, tuple[list[ShapeEnv], list[str]]] = {}  # those that export → what they made, names of sources
_make_shapes: Any = ShapeEnv.__init__
_keep_source: Any = type(_sources).cache


def _noting_shapes(self: ShapeEnv, *args: Any, **kwargs: Any) -> None:
    shapes, _ = _threads.get(threading.get_ident(), ([], []))
    shapes.append(self)
    _make_shapes(self, *args, **kwargs)


def _noting_source(self: Any, *args: Any, **kwargs: Any) -> str:
    name: str = _keep_source(self, *args, **kwargs)
    _, sources = _threads.get(threading.get_ident(), ([], []))
    sources.append(name)
    return name


def _switch(shapes: Any, source: Any) -> None:
    ShapeEnv.__init__ = shapes  # type: ignore[method-assign]
    type(_sources).cache = source  # type: ignore[method-assign]


@undoing
def traces_forgotten() -> Iterator[None]:
    """Let go at the end of all that torch keeps of the graphs that are traced meanwhile, in this thread."""
    thread = threading.get_ident()
    with _lock:
        _threads[thread] = [], []
        _switch(_noting_shapes, _noting_source)
    try:
        yield
    finally:
        with _lock:
            shapes, sources = _threads.pop(thread)
            if not _threads:
                _switch(_make_shapes, _keep_source)
        for one in shapes:
            one.tracked_fakes = None
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for name in sources:
            _sources.eval_cache.pop(name, None)
            linecache.cache.pop(name, None)
