"""Which unit reaches an index, told by the bits of the units' numbers: 2 · log2(units) looks, not one a unit.

For each bit there are two sets: the units whose numbers have it not, and those whose numbers have it. Of three units,
numbered 00, 01 and 10, these are {0, 2} and {1} for the low bit, {0, 1} and {2} for the high one. An index that one
unit reaches is reached by exactly one set of every pair, and which one spells the unit's number. Two units differ in
some bit, and there both sets reach what they share. Neither does where nobody reaches the index, which is how unit 0,
whose number has no bit, is told from none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.sites.layout import NOBODY

Owners = tuple[int, ...]


def sets_of_units(num_units: int) -> Tensor:
    """Return bool `[2 · bits, units]`: for each bit, lowest first, the units without it, then those with it.

    A lone unit has one bit, so that there is something to look at; the set of units with it is empty.
    """
    numbers = torch.arange(num_units)
    bits = max(1, (num_units - 1).bit_length())
    return torch.stack([(numbers >> bit) % 2 == value for bit in range(bits) for value in (0, 1)])


def owners_along(reached: Tensor) -> Owners | Literal["mixed"] | None:
    """Read the owner of each index from `reached` `[2 · bits, indices]`: which sets of units reach it.

    An index that nobody reaches is `NOBODY`'s. None = the axis is not divided: nobody reaches it, or every index that
    is reached is so by both sets of every pair, as by all units. "mixed" = some index is reached by several units,
    and others are not, or not by as many. Several units between which every bit varies cannot be told from all.
    """
    without, with_it = reached.view(-1, 2, reached.shape[-1]).unbind(dim=1)
    used = reached.any(dim=0)
    if bool((used == (without & with_it).all(dim=0)).all()):
        return None
    owned = (without ^ with_it).all(dim=0)
    if bool((used & ~owned).any()):
        return "mixed"
    place_values = 2 ** torch.arange(len(with_it))
    numbers = (with_it * place_values[:, None]).sum(dim=0)
    return tuple(torch.where(owned, numbers, NOBODY).tolist())
