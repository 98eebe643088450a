"""Random numbers that depend on a seed alone, whatever else draws numbers in the process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def generator(*numbers: int) -> torch.Generator:
    """Return a generator that depends on the numbers alone; hashed, since neighbouring seeds can draw alike."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Drawn(TorchDispatchMode):
    """While it is entered, a network's first weights are those that it has after `torch.manual_seed(seed)`.

    That is for tensors on the CPU, and in this thread alone: others neither change what is drawn here nor notice it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand the generator to what takes one."""
        given = dict(kwargs or {})
        if any(argument.name == "generator" for argument in func._schema.arguments):
            given["generator"] = self.generator
        return func(*args, **given)
