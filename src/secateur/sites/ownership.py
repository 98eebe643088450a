"""Which rows and columns of which weights belong to each unit: found by gradients, without naming any model.

A unit owns an index of a weight if the gradient of something that the unit computed reaches the index and no other
unit's does. Units are asked in sets, by the bits of their numbers: see binary_codes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.sites.binary_codes import owners_along, sets_of_units
from secateur.sites.layout import Slice


@dataclass(frozen=True)
class Part:
    """What units compute in one role: of heads, their queries, keys, values, or what the output makes of them.

    `computed_by(chosen)` returns what the units in `chosen` (bool `[units]`) alone computed, with its gradients.
    """

    role: str
    num_units: int
    computed_by: Callable[[Tensor], Sequence[Tensor]]

    @classmethod
    def along_first_axis(cls, role: str, *tensors: Tensor) -> Part:
        """Return the part whose units are the entries of `tensors`, each `[units, …]`."""

        def computed_by(chosen: Tensor) -> list[Tensor]:
            return [only(chosen, tensor, axis=0) for tensor in tensors]

        return cls(role, len(tensors[0]), computed_by)


def only(chosen: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Return `tensor` with zeros for all but the units in `chosen` (bool `[units]`), which lie along `axis`."""
    shape = [1] * tensor.ndim
    shape[axis] = len(chosen)
    return tensor * chosen.to(tensor).view(shape)


class Ownership:
    """Asks which parameters of a model single units use; messages call them by their `kind`, such as heads."""

    def __init__(self, base: PreTrainedModel, kind: str) -> None:
        self.base = base
        self.kind = kind
        self.random = torch.Generator().manual_seed(0)  # draws the directions of the gradients
        self.names: dict[int, str] = {}

    def look_up_names(self) -> None:
        """Learn which parameter is called what, as of now: those of an offloaded model come and go."""
        self.names = {id(p): n for n, p in self.base.named_parameters()}

    def is_matrix(self, piece: Slice) -> bool:
        """Is it more than a bias that is divided?"""
        return self.base.get_parameter(piece.parameter).ndim > 1

    def slices(self, site: str, module: nn.Module, part: Part, leave_out: Collection[str] = ()) -> list[Slice]:
        """Back-propagate from sets of units; an axis along which they reach different indices is theirs.

        `part` was computed with parameters of `module`; those named in `leave_out` are not looked at. Raises
        `UnsupportedModelError` for an index that some units share.
        """
        holders = {
            id(p): holder for holder in module.modules() for p in holder.parameters(recurse=False) if p.requires_grad
        }
        parameters = [
            p
            for p in module.parameters()
            if id(p) in holders and id(p) in self.names and self.names[id(p)] not in leave_out
        ]
        return self.slices_of(site, parameters, holders, part)

    def slices_of(
        self, site: str, parameters: Sequence[nn.Parameter], holders: Mapping[int, nn.Module], part: Part
    ) -> list[Slice]:
        """Ask about these parameters alone; `holders` has the module of each by its id. See `slices`."""
        pieces = []
        for parameter, by_axis in zip(parameters, self._reached(parameters, part), strict=True):
            for axis, reached in enumerate(by_axis):
                if part.num_units == 1 and _only_unit_axis(holders[id(parameter)], parameter, part.role) != axis:
                    continue  # a lone unit reaches both axes of its matrix: only the layer's kind tells which is which
                owners = owners_along(reached)
                if owners == "mixed":
                    raise UnsupportedModelError(
                        f"site {site}: an index of {self.names[id(parameter)]} is used by several {self.kind} but not "
                        "by all"
                    )
                if owners is not None:
                    pieces.append(Slice(self.names[id(parameter)], axis, part.role, owners))
        return pieces

    def divides(self, parameters: Sequence[nn.Parameter], part: Part) -> bool:
        """Does the lowest bit of the units' numbers divide an axis of any of these? What two passes can say."""
        pair = self._reached(parameters, part, sets_of_units(part.num_units)[:2])
        return any(bool(reached.any()) and not (reached[0] & reached[1]).any() for axes in pair for reached in axes)

    def _reached(
        self, parameters: Sequence[nn.Parameter], part: Part, sets: Tensor | None = None
    ) -> list[list[Tensor]]:
        """Return, for each parameter and each of its axes, which sets of units reach which indices: `[sets, indices]`.

        The gradients of one set are there at a time.
        """
        sets = sets_of_units(part.num_units) if sets is None else sets
        reached = [[torch.zeros(len(sets), size, dtype=torch.bool) for size in p.shape] for p in parameters]
        for number, chosen in enumerate(sets):
            if not parameters or not chosen.any():
                continue
            for by_axis, gradient in zip(reached, self._gradients(part.computed_by(chosen), parameters), strict=True):
                for axis, used in enumerate([] if gradient is None else _used_by_axis(gradient)):
                    by_axis[axis][number] = used
        return reached

    def _gradients(self, computed: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        """Return the gradients of `computed` in a random direction, None where there is none."""
        computed = [tensor for tensor in computed if tensor.requires_grad]
        if not computed:
            return [None] * len(parameters)
        directions = [torch.randn(tensor.shape, generator=self.random).to(tensor) for tensor in computed]
        return torch.autograd.grad(computed, parameters, directions, retain_graph=True, allow_unused=True)


def _used_by_axis(gradient: Tensor) -> list[Tensor]:
    """Return, for each axis, which indices have a gradient that is not zero: bool `[indices]`."""
    used = gradient != 0
    if used.ndim == 1:
        return [used.cpu()]
    return [used.any(dim=[a for a in range(used.ndim) if a != axis]).cpu() for axis in range(used.ndim)]


def _only_unit_axis(holder: nn.Module, parameter: nn.Parameter, role: str) -> int | None:
    """Return the axis that would be a lone unit's: what a linear layer writes for it, or what the output reads."""
    if not isinstance(holder, nn.Linear | Conv1D):
        return None
    if parameter.ndim == 1:
        return None if role == "output" else 0
    written = 1 if isinstance(holder, Conv1D) else 0
    return 1 - written if role == "output" else written
