"""Where in a model an exception came from, in words: the attention site and the line of its code."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

_NOT_ITS_OWN = ("torch.", "secateur.", "accelerate.")  # whose frames lie between the lines of a model's own code


@dataclass(frozen=True)
class Failure:
    """The attention site whose code raised, if it was one's, and `place`: class, method and line of that code."""

    site: str | None
    place: str


def locate(error: BaseException, base: PreTrainedModel, sites: Iterable[str]) -> Failure:
    """Find the innermost line of the model's own code that `error` passed through."""
    names = {id(module): name for name, module in base.named_modules()}
    known = set(sites)
    site, place = None, type(base).__name__
    for frame, line in traceback.walk_tb(error.__traceback__):  # outermost first
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or id(module) not in names:
            continue
        if str(frame.f_globals.get("__name__", "")).startswith(_NOT_ITS_OWN):
            continue
        name = names[id(module)]
        inside = [s for s in known if name == s or name.startswith(s + ".")]
        site = max(inside, key=len, default=_only_below(name, known))
        text = " ".join(linecache.getline(frame.f_code.co_filename, line).split())
        place = f"{type(module).__name__}.{frame.f_code.co_name}" + (f", `{text}`" if text else "")
    return Failure(site, place)


def _only_below(name: str, sites: set[str]) -> str | None:
    """Return the site within the module `name`, where there is just one: code around a site often counts for it."""
    below = [s for s in sites if s.startswith(name + ".")]
    return below[0] if len(below) == 1 else None
