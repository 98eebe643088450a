"""Where in a model an exception came from: the module that was running, and in words the line of its code."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread


@undoing
def running_modules(base: PreTrainedModel) -> Iterator[list[str]]:
    """Yield the paths of the modules of the model's own code that run, outermost first, kept up to date by hooks.

    Where an exception ends the pass, they are those that it came through. torch's own modules, such as a linear layer,
    count as part of the module that calls them.
    """
    running: list[str] = []
    with ExitStack() as hooks:
        for name, module in base.named_modules():
            if type(module).__module__.startswith("torch."):
                continue

            def enter(*_: Any, name: str = name) -> None:
                running.append(name)

            def leave(*_: Any, name: str = name) -> None:
                while running.pop() != name:  # those within it whose exception was caught
                    pass

            hooks.callback(module.register_forward_pre_hook(in_own_thread(enter)).remove)
            hooks.callback(module.register_forward_hook(in_own_thread(leave)).remove)
        yield running


def site_of(running: list[str], sites: Iterable[str]) -> str | None:
    """Return the site that the innermost running module is in, or that is the only one in it.

    Code around a site often counts for it.
    """
    if not running:
        return None
    name = running[-1]
    around = [site for site in sites if name == site or name.startswith(site + ".")]
    below = [site for site in sites if site.startswith(name + ".")]
    return max(around, key=len, default=below[0] if len(below) == 1 else None)


def place_of(error: BaseException, module: nn.Module) -> str:
    """Return, for a message, the class of `module` and the innermost line of its methods that `error` came through."""
    kind = type(module)
    files = {parent.__module__ for parent in kind.__mro__ if not parent.__module__.startswith(("torch.", "secateur."))}
    place = kind.__name__
    for frame, line in traceback.walk_tb(error.__traceback__):  # outermost first
        method = frame.f_code.co_name
        if frame.f_globals.get("__name__") in files and hasattr(kind, method):
            text = " ".join(linecache.getline(frame.f_code.co_filename, line).split())
            place = f"{kind.__name__}.{method}" + (f", `{text}`" if text else "")
    return place
