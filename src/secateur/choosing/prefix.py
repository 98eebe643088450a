"""Passes that begin where a site lies: what the layers before it return is known from an earlier pass."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.models.finite import tensors_of
from secateur.models.state import hooked
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread, is_own

_MOST_BYTES = 2**30  # of what is kept for all batches together; beyond that every pass begins at the beginning


class Prefix:
    """What the layers before a place return for each of `batches`, so that a pass there need not run them again.

    `lists` are the paths of the model's lists of layers, each of which runs once and keeps the shape of what it is
    given. Where a pass that leaves layers out ends elsewhere, because others read what they write, all are always run.
    """

    def __init__(
        self, base: PreTrainedModel, batches: Sequence[Mapping[str, Any]], lists: Collection[str] = ()
    ) -> None:
        self.base, self.batches, self.lists = base, batches, lists
        self._known: dict[int, tuple[str, int, Any]] = {}  # batch → list, number of the layer before which, and what
        self._is_of_use = all(self._is_exact(name) for name in lists)

    def layer_of(self, site: str) -> nn.Module | None:
        """Return the layer that a site lies in, None where it lies in none."""
        place = layer_of(site, self.lists)
        return None if place is None else self.base.get_submodule("{}.{}".format(*place))

    @undoing
    def passing(self, number: int, site: str) -> Iterator[None]:
        """Within this context a pass over batch `number` leaves out layers before the site's, as far as it can.

        It notes what the last of these returns. Nothing before the site's layer may be gated or changed meanwhile.
        """
        place = layer_of(site, self.lists)
        if not self._is_of_use or place is None or place[1] == 0:
            yield
            return
        name, first = place
        layers: Any = list(self.base.get_submodule(name).children())
        known = self._known.get(number)
        written: list[Any] = []
        with ExitStack() as stack:
            if known is not None and known[0] == name and known[1] <= first:
                for layer in layers[: known[1]]:
                    stack.enter_context(_returning(layer, known[2]))
            if known is None or known[:2] != place:
                stack.enter_context(_noting(layers[first - 1], written))
            yield
        if written:
            self._keep(number, name, first, written[0])

    def _keep(self, number: int, name: str, first: int, output: Any) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(output))
        if size * len(self.batches) > _MOST_BYTES:
            self._is_of_use = False
            self._known.clear()
            return
        self._known[number] = (name, first, output)

    def _is_exact(self, name: str) -> bool:
        """Does a pass in which all layers but the last return what the one before it does end as a whole one?"""
        layers: Any = list(self.base.get_submodule(name).children())
        if len(layers) < 2 or not self.batches:
            return True
        written: list[Any] = []
        with _noting(layers[-2], written):
            whole = self.base(**self.batches[0])[0]
        if not written:
            return False
        with ExitStack() as stack:
            for layer in layers[:-1]:
                stack.enter_context(_returning(layer, written[0]))
            found = self.base(**self.batches[0])[0]
        return isinstance(whole, Tensor) and torch.equal(whole, found)


def _noting(layer: nn.Module, written: list[Any]) -> AbstractContextManager[None]:
    """Add what a layer returns meanwhile to `written`."""

    def hook(module: nn.Module, given: Any, output: Any) -> None:
        written.append(output)

    return hooked(layer.register_forward_hook(in_own_thread(one)) for one in [hook])


@undoing
def _returning(layer: nn.Module, output: Any) -> Iterator[None]:
    before, usual, thread = vars(layer).get("forward"), layer.forward, threading.get_ident()
    vars(layer)["forward"] = lambda *args, **kwargs: output if is_own(thread) else usual(*args, **kwargs)
    try:
        yield
    finally:
        if before is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = before


def layer_of(site: str, lists: Iterable[str]) -> tuple[str, int] | None:
    """Return the list and the number of the layer that a site lies in, None where it lies in none."""
    for name in lists:
        if site.startswith(f"{name}."):
            return name, int(site[len(name) + 1 :].split(".")[0])
    return None
