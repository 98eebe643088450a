"""Second moments of what an output projection is given, and the least-squares refit that they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.models.state import without_autocast
from secateur.settings import Reading
from secateur.sites.feed_forward import channel_axis, rows_of_tokens
from secateur.sites.layout import NOBODY, Site
from secateur.support.processes import in_order


class Projection:
    """A site's output projection: what units write with, `rows` `[inputs, model width]` in float64, and its bias."""

    def __init__(self, base: PreTrainedModel, site: Site) -> None:
        piece = next(p for p in site.slices_of("output") if base.get_parameter(p.parameter).ndim > 1)
        self.module: Any = base.get_submodule(site.output)
        self.weight = base.get_parameter(piece.parameter)
        self.owners = torch.tensor(piece.owners)
        self.channels = channel_axis(self.module)

    @property
    def rows(self) -> Tensor:
        """The weight as `[inputs, model width]`, float64, on the CPU."""
        weight = self.weight.detach().to("cpu", torch.float64).flatten(1)
        return weight if isinstance(self.module, Conv1D) else weight.T

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, None where there is none."""
        return self.module.bias

    def stays(self, kept: Tensor) -> Tensor:
        """Return which inputs come from the units in `kept` (bool `[units]`), or from none."""
        return (self.owners == NOBODY) | kept[self.owners.clamp(min=0)]

    def refitted(self, fit: Fit, stays: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that a fit gives, the rows of what goes as they are."""
        rows, change, bias = self.rows.clone(), fit.change(ridge), self.bias
        rows[stays] += change
        shift = fit.shift(change)
        moved = None if bias is None or shift is None else (bias.detach().cpu().double() + shift).to(bias)
        return self.as_weight(rows), moved

    def as_weight(self, rows: Tensor) -> Tensor:
        """Return `[inputs, model width]` in the form of the weight."""
        weight = rows if isinstance(self.module, Conv1D) else rows.T
        return weight.reshape(self.weight.shape).contiguous().to(self.weight)


@dataclass
class Moments:
    """Of the inputs x of a projection over `count` tokens: `gram` = Σ x xᵀ `[inputs, inputs]`, and `total` = Σ x."""

    gram: Tensor
    total: Tensor
    count: int

    def __iadd__(self, other: Moments) -> Moments:
        """Take in the tokens of another, in place: of thousands of neurons a second sum is large."""
        self.gram += other.gram
        self.total += other.total
        self.count += other.count
        return self


class Fit:
    """What moments say of making up for the inputs that go, by those in `stays` (bool `[inputs]`).

    With K and R the inputs that stay and go, the squared difference between x W and x_K (W_K + D) + d, summed over
    tokens, is least for D = (C_KK + ridge)⁻¹ C_KR W_R and d = m_R W_R − m_K D, where m is the mean and C the second
    moment about it. Without a bias d is 0, and C the second moment about 0.
    """

    def __init__(self, moments: Moments, stays: Tensor, rows: Tensor, with_bias: bool) -> None:
        gone, kept, lost = rows[~stays], stays.nonzero(), (~stays).nonzero()
        mean = moments.total.double() / max(moments.count, 1)
        self.mean, self.written = mean[stays], mean[~stays] @ gone
        self.with_bias = with_bias

        def block(some: Tensor, others: Tensor) -> Tensor:
            """Return a part of C in float64, the only ones that are needed: all of it would take twice the memory."""
            part = moments.gram[some, others.T].double()
            return part.addr_(mean[some[:, 0]], mean[others[:, 0]], alpha=-moments.count) if with_bias else part

        def error(about: Tensor) -> float:
            """Return the squared difference to what all units wrote, summed over tokens, where nothing changes."""
            return float((gone * (about @ gone)).sum())

        self.lost = error(moments.gram[lost, lost.T].double())
        among_lost = block(lost, lost)
        self.least, traced = error(among_lost), among_lost.diagonal().clone()
        del among_lost
        self.across, self.among = block(kept, lost) @ gone, block(kept, kept)
        self.unit = float(torch.cat([self.among.diagonal(), traced]).mean())

    def change(self, ridge: float) -> Tensor:
        """Return D; `ridge` is in units of the mean second moment. 0 where inputs vary by less than their rounding."""
        loaded = self.among.clone()
        loaded.diagonal().add_(ridge * self.unit)
        factor, failed = torch.linalg.cholesky_ex(loaded)
        return torch.zeros_like(self.across) if int(failed) else torch.cholesky_solve(self.across, factor)

    def shift(self, change: Tensor) -> Tensor | None:
        """Return d for D, None without a bias."""
        return self.written - self.mean @ change if self.with_bias else None

    def error(self, change: Tensor) -> float:
        """Return what is left of the squared difference with D, and d where there is a bias."""
        return self.least + float((change * (self.among @ change - 2 * self.across)).sum())


class _Reached(Exception):
    """The projection has read; nothing after it matters."""


def moments_of(
    base: PreTrainedModel, projection: Projection, batches: Sequence[Mapping[str, Any]], reading: Reading
) -> list[Moments]:
    """Return the moments of the even batches and of the odd ones, on the CPU; nothing where a half misses the site.

    Passes end at the projection, unless layers share it and it runs again. One site's moments are there at a time, so
    that memory does not grow with the number of sites.
    """
    ends = _runs_once(base, projection, batches[0])

    def read(number: int) -> Moments | None:
        with _reading(projection, batches[number], ends) as found, suppress(_Reached):
            base(**batches[number])
        return found[0] if found else None

    halves: dict[int, Moments] = {}
    for number, found in enumerate(in_order(read, range(len(batches)), reading.accelerator)):
        if found is not None:
            half = number % 2
            if half in halves:
                halves[half] += found
            else:
                halves[half] = found
    return [halves[0], halves[1]] if len(halves) == 2 else []


def summed(halves: list[Moments]) -> Moments:
    """Return the moments of both halves; the list is empty then, and the memory of one of them free."""
    both = halves.pop(0)
    both += halves.pop()
    return both


def _runs_once(base: PreTrainedModel, projection: Projection, batch: Mapping[str, Any]) -> bool:
    calls = []
    handle = projection.module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        base(**batch)
    finally:
        handle.remove()
    return len(calls) == 1


@contextmanager
def _reading(projection: Projection, batch: Mapping[str, Any], ends: bool) -> Iterator[list[Moments]]:
    """Within this context a pass adds the moments of what the projection is given to what is yielded, and may end."""
    found: list[Moments] = []
    hook = _hook(found, projection.channels, batch.get("attention_mask"), ends)
    handle = projection.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _hook(found: list[Moments], channels: int, mask: Tensor | None, ends: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach().float()
        rows = rows_of_tokens(taken, channels, mask)
        with without_autocast(taken.device):
            moments = Moments((rows.T @ rows).cpu(), rows.sum(dim=0).cpu(), len(rows))
        if found:
            found[0] += moments
        else:
            found.append(moments)
        if ends:
            raise _Reached

    return hook
