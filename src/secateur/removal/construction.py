"""Which models are under construction: only a constructor knows that it builds a model as a part of another.

A part is handed over when it is finished, so nothing on it says whose it is while its own constructor ends. Therefore
the constructor of every class of models notes, for as long as it runs, which model it builds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_under_construction: ContextVar[tuple[PreTrainedModel, ...]] = ContextVar("secateur_under_construction", default=())


def under_construction() -> tuple[PreTrainedModel, ...]:
    """Return the models whose constructors run, outermost first, since the last `from_pretrained` among them.

    What a constructor reads by `from_pretrained` is no part of what it builds, but a model of its own.
    """
    return _under_construction.get()


@contextmanager
def _noted(models: tuple[PreTrainedModel, ...]) -> Iterator[None]:
    token = _under_construction.set(models)
    try:
        yield
    finally:
        _under_construction.reset(token)


def on_its_own() -> AbstractContextManager[None]:
    """Within this context what is built is no part of a model whose constructor runs."""
    return _noted(())


def install(root: Any) -> None:
    """Wrap the constructors of `root` and of the classes below it, those to come included, and `from_pretrained`."""
    _wrap_constructors_(root)
    prepare, read = root.__init_subclass__.__func__, root.from_pretrained.__func__

    @functools.wraps(prepare)
    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        prepare(cls, **kwargs)
        _wrap_constructor_(cls)

    @functools.wraps(read)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with on_its_own():
            return read(cls, *args, **kwargs)

    root.__init_subclass__ = classmethod(__init_subclass__)
    root.from_pretrained = classmethod(from_pretrained)


def _wrap_constructors_(cls: Any) -> None:
    """Wrap the constructor of a class and of all that inherit from it; where that is done already, nothing changes."""
    _wrap_constructor_(cls)
    for child in cls.__subclasses__():
        _wrap_constructors_(child)


def _wrap_constructor_(cls: Any) -> None:
    """Let the constructor of a class note what it builds, unless it is inherited from a class where it does already.

    A mixin's constructor is wrapped on the class that inherits it, and stays as it is on the mixin.
    """
    build = cls.__init__
    if getattr(build, "_secateur", False):
        return

    @functools.wraps(build)
    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with _noted((*under_construction(), self)):
            build(self, *args, **kwargs)

    __init__._secateur = True  # type: ignore[attr-defined]
    cls.__init__ = __init__
