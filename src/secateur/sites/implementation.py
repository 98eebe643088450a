"""Which attention function a model looks up while its heads are read or gated: the names in its configs.

transformers looks attention functions and mask builders up by the name in each module's config. While `own_names` lasts
these are ours. They are put in again before every pass: the caller, or the model's own code, as Whisper's `generate`
does, may ask for another implementation in between. That one is looked up through us from then on, and stays.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread, is_own

PREFIX = "secateur_"


class _Name(str):
    """A name in a config while we hold it: looked up, it is ours; to code that compares names, it is that of its kind.

    Only `==` and `in` say so: code asks `in ("eager", "sdpa")` for what its attention function takes. `!=` compares the
    text, as code asks `!= "eager"` for whether to look a function up, and transformers for whether a name is another.

    To other threads than the one that holds the model it is the name that was asked for: their passes, of which one may
    be on its way, build masks and attend as they would without us.
    """

    asked: str | None = None
    """The name that the caller or the model chose."""

    thread: int = 0

    def __eq__(self, other: object) -> bool:
        if not is_own(self.thread):
            return isinstance(other, str) and str(other) == self._text()
        return isinstance(other, str) and str(other) in (str(self), self.removeprefix(PREFIX))

    def __ne__(self, other: object) -> bool:
        return str.__ne__(self._text(), other)

    def __hash__(self) -> int:
        return hash(self._text())

    def _text(self) -> str:
        return str(self) if is_own(self.thread) else self.asked or self.removeprefix(PREFIX)


class _Names:
    """What one `own_names` context holds: the configs of a model that count, and whether it needs maps."""

    def __init__(self, base: PreTrainedModel, maps: bool) -> None:
        self.base, self.maps = base, maps
        self.modules = [m for m in base.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)]
        self.configs: dict[int, Any] = {id(module.config): module.config for module in self.modules}
        # Configs that no attention of the interface consults hold the plain name of the kind.
        self.reaching = {id(module.config) for module in self.modules if goes_through_interface(module)}

    def settle(self) -> None:
        """Put into the configs what the contexts of this model need that are open; with none, what was asked for."""
        open_now = [names for names in _open.copy() if names.base is self.base]
        for key, config in self.configs.items():
            asked = asked_name(config)
            name: str | None = asked
            if open_now:
                kind = _kind(self.base, asked, any(names.maps for names in open_now))
                name = _Name(PREFIX + kind if key in self.reaching else kind)
                name.asked, name.thread = asked, threading.get_ident()
            config._attn_implementation_internal = name

    def before_pass(self, module: Any, _: Any) -> None:
        """Settle again where another name was put into the config."""
        if not isinstance(module.config._attn_implementation_internal, _Name):
            self.settle()


_open: list[_Names] = []  # outermost first


@undoing
def own_names(base: PreTrainedModel, maps: bool) -> Iterator[None]:
    """Let the model look up our attention functions meanwhile, those that return maps where `maps` asks for them.

    At the end the configs have the names that were there before, or what was asked for in between.
    """
    names = _Names(base, maps)
    with ExitStack() as hooks:
        for module in names.modules:
            hooks.callback(module.register_forward_pre_hook(in_own_thread(names.before_pass)).remove)
        _open.append(names)
        try:
            names.settle()
            yield
        finally:
            _open.remove(names)
            names.settle()


def asked_name(config: PreTrainedConfig) -> str | None:
    """Return the name of the implementation that a config has, or has where it is not held."""
    name: str | None = config._attn_implementation_internal
    return name.asked if isinstance(name, _Name) else name


def _kind(base: PreTrainedModel, asked: str | None, need_maps: bool) -> str:
    return "eager" if need_maps or asked in ("eager", None) or not base._supports_sdpa else "sdpa"


def goes_through_interface(module: nn.Module) -> bool:
    """Does the file of the module's class look attention functions up?"""
    files = {parent.__module__ for parent in type(module).__mro__} - {PreTrainedModel.__module__}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)
