"""Hooks that only the passes of their own thread feel, so that others may run the same model meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def is_own(thread: int) -> bool:
    """Does the thread of that number run here, or autograd on its behalf?

    Gradient checkpointing runs a block again in the backward pass, which on a GPU is in a thread of autograd's.
    """
    return threading.get_ident() == thread or torch._C._current_graph_task_id() != -1


def in_own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return `hook` for the passes of the thread that calls this; for those of others it does nothing."""
    thread = threading.get_ident()

    def own(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if is_own(thread) else None

    return own
