"""Lists of layers as sites: each layer, a block that maps the residual stream to itself, is a unit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.sites.layout import Runs, Site, whole_number

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LayerSite(Site):
    """A list of layers, whose units are its entries; it is named by the list, which owns all that its layers hold.

    Layers stand alone: a group is one layer. They own no part of a weight, but whole modules, so there are no slices.
    """

    kind: ClassVar[str] = "layers"

    def kept_owners(self, role: str, kept: Tensor) -> Tensor:
        """Return the layers in `kept` (bool `[layers]`)."""
        return kept

    def counts(self, kept: Tensor) -> dict[str, int]:
        """Return how many layers are left."""
        return {"layers": int(kept.sum())}

    def check(self, kept: Tensor) -> None:
        """Any layers may stay."""

    def to_json(self) -> dict[str, Any]:
        """Return the length of the list before any layer went."""
        return {"kind": self.kind, "num_layers": self.original_num_units}

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any], runs: Runs | None = None) -> LayerSite:
        """Rebuild the unpruned site `name`. Raises `KeyError`, `TypeError` or `ValueError` for other data."""
        return cls.unpruned(name, whole_number(data["num_layers"], 1, _MOST_LAYERS))

    @classmethod
    def unpruned(cls, name: str, num_units: int) -> LayerSite:
        """Return the site as it is before any layer goes."""
        return cls(
            name=name, num_units=num_units, num_groups=num_units, width=1, slices=(), attributes={}, output=name,
            units=tuple(range(num_units)), original_num_units=num_units, original_num_groups=num_units,
        )  # fmt: skip


@dataclass
class _Seen:
    """What a pass showed of a list: which layers ran, in that order, and whether each took what the one before gave."""

    runs: list[int] = field(default_factory=list)
    is_chain: bool = True
    written: Tensor | None = None


class LayerFinder:
    """Collects which lists of modules one forward pass of a base model runs as layers, one after the other."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.lists = {
            name: module
            for name, module in base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 0
        }
        self.seen: dict[str, _Seen] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every entry of every list meanwhile."""
        with ExitStack() as hooks:
            for name, layers in self.lists.items():
                for number, layer in enumerate(layers):
                    hooks.callback(layer.register_forward_hook(self._reader(name, number), with_kwargs=True).remove)
            yield

    def _reader(self, name: str, number: int) -> Callable[..., None]:
        thread = threading.get_ident()

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() != thread:
                return  # another may run the model meanwhile
            seen = self.seen.setdefault(name, _Seen())
            taken, written = stream_into(args, kwargs), stream_out_of(output)
            keeps_shape = taken is not None and written is not None and taken.shape == written.shape
            follows = not seen.runs or (keeps_shape and _is_same(taken, seen.written))
            seen.is_chain &= keeps_shape and follows
            seen.runs.append(number)
            seen.written = written

        return hook

    def sites(self) -> dict[str, LayerSite]:
        """Return the lists that ran once from end to end, each entry on what the last one gave; none within another."""
        found: dict[str, LayerSite] = {}
        for name, layers in self.lists.items():
            seen = self.seen.get(name)
            within = any(name.startswith(f"{outer}.") for outer in found)
            if seen is not None and seen.is_chain and not within and seen.runs == list(range(len(layers))):
                found[name] = LayerSite.unpruned(name, len(layers))
        return found


def _is_same(taken: Tensor | None, written: Tensor | None) -> bool:
    return taken is not None and written is not None and torch.equal(taken, written)


def stream_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the residual stream that a layer is given: its first argument, or the first tensor by name."""
    given = [*args[:1], *([] if args else kwargs.values())]
    return next((x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1), None)


def stream_out_of(output: Any) -> Tensor | None:
    """Return the residual stream that a layer returns: its output, or the first entry of it."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
