"""Ctrl-C that waits while a model is being changed or put back, for as long as that takes and no longer.

A `with` statement undoes what its block did, but Python may raise `KeyboardInterrupt` in the middle of the undoing, and
even before its first line. So while one of our contexts is open, its SIGINT handler looks at what was interrupted: in
code that enters or leaves a context, ours or torch's, the signal waits; anywhere else it is handled as before.
"""

from __future__ import annotations

import _thread
import functools
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_WAITING = frozenset({"__enter__", "__exit__", "enter_context"})
_SOON = 0.005  # seconds after which a signal that waits asks again


class _State:
    """What the contexts of the main thread share; no other thread handles signals."""

    open = 0
    pending = False
    heard = 0
    previous: Any = None


_lock = threading.Lock()  # never taken by the handler, which may interrupt its holder
_interruptible: set[int] = set()  # ids of the code of functions, which live as long as this process


def undoing(function: Callable[_Arguments, Iterator[_Result]]) -> Callable[_Arguments, AbstractContextManager[_Result]]:
    """Make a context of a generator function, as `contextmanager` does, whose two halves Ctrl-C does not break."""
    make = contextmanager(function)

    @functools.wraps(function)
    def context(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> AbstractContextManager[_Result]:
        return _Undoing(make(*args, **kwargs))

    return context


def interruptible(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function undo what it does, also where Ctrl-C comes, and raise at once even if a context entering calls it.

    For what takes long, and for what begins with contexts of torch's.
    """
    _interruptible.add(id(inspect.unwrap(function).__code__))

    @functools.wraps(function)
    def scoped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _Undoing(_Nothing()):
            return function(*args, **kwargs)

    return scoped


def in_one_go(step: Callable[[], _Result]) -> _Result:
    """Take a short step that is done whole before Ctrl-C is heard, within a context of ours."""
    return step()


def interrupts_heard() -> int:
    """Return how many Ctrl-C have come within contexts of ours; what runs there may make other errors of them."""
    return _State.heard


class _Nothing(AbstractContextManager[None]):
    def __exit__(self, *_: object) -> None:
        return None


class _Undoing(AbstractContextManager[Any]):
    def __init__(self, inner: AbstractContextManager[Any]) -> None:
        self.inner, self.counts = inner, False

    def __enter__(self) -> Any:
        self.counts = _begin()
        try:
            return self.inner.__enter__()
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self.inner.__exit__(kind, error, trace)
        finally:
            self._end()

    def _end(self) -> None:
        if self.counts:
            self.counts = False
            _end()


def _begin() -> bool:
    """Count one more context that is open, where signals are handled; with the first, the handler is ours."""
    if threading.current_thread() is not threading.main_thread():
        return False
    if not _State.open:
        before = signal.getsignal(signal.SIGINT)
        if not callable(before):  # ignored, or left to the system
            return False
        _State.previous = before
        signal.signal(signal.SIGINT, _on_interrupt)
    _State.open += 1
    return True


def _end() -> None:
    """Count one less; after the last the handler is the one before, and what still waits is handled."""
    _State.open -= 1
    if _State.open:
        return
    with _lock:  # a reminder has sent its signal, which our handler still gets, or never will
        waits, _State.pending = _State.pending, False
    if signal.getsignal(signal.SIGINT) is _on_interrupt:
        signal.signal(signal.SIGINT, _State.previous)
    waits, _State.pending = waits or _State.pending, False
    if waits:
        _State.previous(signal.SIGINT, None)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if _has_to_wait(frame):
        _State.pending = True
        _thread.start_new_thread(_remind, ())
        return
    _State.pending = False
    _State.heard += 1
    _State.previous(number, frame)


def _has_to_wait(frame: FrameType | None) -> bool:
    """Was a context being entered or left, or a step taken in one go, since the last function that may be broken?"""
    while frame is not None:
        if id(frame.f_code) in _interruptible:
            return False
        if frame.f_code.co_name in _WAITING or frame.f_code is in_one_go.__code__:
            return True
        frame = frame.f_back
    return False


def _remind() -> None:
    time.sleep(_SOON)
    with _lock:
        if _State.pending:
            _thread.interrupt_main()
