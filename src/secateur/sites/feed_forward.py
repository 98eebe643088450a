"""Feed-forward blocks as sites: each hidden number between two projections, a neuron, is a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.sites.layout import LONGEST_AXIS, Runs, Site, Slice, absolute, whole_number

Projection = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d
"""What may read the neurons: the same mixture of channels at every place."""


@dataclass(frozen=True)
class FeedForwardSite(Site):
    """A feed-forward block, whose units are its neurons: the numbers that its last projection reads.

    It is named by that projection, which is also its `output`. What a neuron owns of the projections before it, its
    rows, has the role "neuron"; what the last one reads it with, a column, the role "output". Neurons stand alone: a
    group is one neuron, one number wide.
    """

    kind: ClassVar[str] = "neurons"

    def kept_owners(self, role: str, kept: Tensor) -> Tensor:
        """Return which owners are left: the neurons in `kept` (bool `[neurons]`)."""
        return kept

    def counts(self, kept: Tensor) -> dict[str, int]:
        """Return what each kind of attribute counts once only the neurons in `kept` (bool `[neurons]`) are left."""
        return {"neurons": int(kept.sum())}

    def check(self, kept: Tensor) -> None:
        """Any neurons may stay."""

    def to_json(self) -> dict[str, Any]:
        """Return the layout relative to the block that holds the projections, equal for all blocks of one kind."""
        return {"kind": self.kind, "num_neurons": self.original_num_units, **self.relative()}

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any], runs: Runs | None = None) -> FeedForwardSite:
        """Rebuild the unpruned site `name`. Raises `KeyError`, `TypeError` or `ValueError` for other data.

        `runs` reads the owners of all sites of a recipe.
        """
        runs = Runs() if runs is None else runs
        count = whole_number(data["num_neurons"], 1, LONGEST_AXIS)
        parts = absolute(name, data, {"neuron": count, "output": count}, runs)
        if not set(parts["attributes"].values()) <= {"neurons"}:
            raise ValueError(f"unknown quantity among {sorted(set(parts['attributes'].values()))}")
        return cls.unpruned(name, runs.units(count), **parts)

    @classmethod
    def unpruned(cls, name: str, units: tuple[int, ...], **others: Any) -> FeedForwardSite:
        """Return the site as it is before any neuron goes; `units` are the numbers of all."""
        count = len(units)
        return cls(
            name=name, num_units=count, num_groups=count, width=1, units=units,
            original_num_units=count, original_num_groups=count, **others,
        )  # fmt: skip


def channel_axis(projection: nn.Module) -> int:
    """Return the axis of a projection's input that holds its channels: the last, or for a convolution the second."""
    return 1 if isinstance(projection, nn.Conv1d | nn.Conv2d) else -1


def is_projection(module: nn.Module) -> bool:
    """Does the module mix channels alike at every place: a linear layer, or a convolution of width one?"""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(module.kernel_size)
        return module.groups == 1 and module.kernel_size == module.stride == ones
    return isinstance(module, nn.Linear | Conv1D)


def num_channels(projection: Any) -> int:
    """Return how many channels a projection reads."""
    return projection.weight.shape[0] if isinstance(projection, Conv1D) else projection.weight.shape[1]


def read_slice(name: str, projection: nn.Module) -> Slice:
    """Return the columns with which the projection at path `name` reads its channels."""
    axis = 0 if isinstance(projection, Conv1D) else 1
    return Slice(f"{name}.weight", axis, "output", tuple(range(num_channels(projection))))


def rows_of_tokens(taken: Tensor, axis: int, mask: Tensor | None) -> Tensor:
    """Return what a projection is given as `[tokens, channels]`, without padding.

    `axis` is that of the channels; `mask` `[batch, tokens]` says what is no padding, and counts as none in another
    shape.
    """
    taken = taken.movedim(axis, -1)
    if mask is not None and mask.shape == taken.shape[:-1]:
        return taken[mask.bool().to(taken.device)]
    return taken.flatten(0, -2)
