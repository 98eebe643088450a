"""Second moments of what an output projection is given, and the least-squares refit that they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.choosing.prefix import Prefix
from secateur.models.fetched import put_away_, set_values_, values_of
from secateur.models.state import without_autocast
from secateur.settings import Reading
from secateur.sites.feed_forward import channel_axis, rows_of_tokens
from secateur.sites.layout import NOBODY, Site
from secateur.support.processes import in_order, is_shared


class Projection:
    """A site's output projection: what units write with, `[inputs, model width]`, and its bias.

    Its weights may be kept elsewhere and fetched when it runs.
    """

    def __init__(self, base: PreTrainedModel, site: Site) -> None:
        piece = next(p for p in site.slices_of("output") if base.get_parameter(p.parameter).ndim > 1)
        self.path = site.output
        self.module: Any = base.get_submodule(site.output)
        self.name = piece.parameter.removeprefix(f"{site.output}.")
        self.owners = torch.tensor(piece.owners)
        self.channels = channel_axis(self.module)
        self._runs: int | None = None

    def by_inputs(self, weight: Tensor) -> Tensor:
        """Return a weight of this projection as `[inputs, model width]`, in the same memory."""
        return weight.flatten(1) if isinstance(self.module, Conv1D) else weight.flatten(1).T

    def rows(self, some: Tensor) -> Tensor:
        """Return what `some` inputs (bool `[inputs]`) are written by, `[some, model width]`, float64, on the CPU."""
        weight, _ = self.values
        return self.by_inputs(weight)[some.to(weight.device)].to("cpu", torch.float64)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return cast(Tensor, getattr(self.module, self.name)).device

    @property
    def is_fetched(self) -> bool:
        """Is the weight kept elsewhere until the projection runs?"""
        return self.device.type == "meta"

    @property
    def has_bias(self) -> bool:
        """Does it add a bias?"""
        return self.module.bias is not None

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias as they are, on the CPU where they are kept elsewhere."""
        weight = values_of(self.module, self.name)
        return weight, values_of(self.module, "bias") if self.has_bias else None

    def set_(self, weight: Tensor, bias: Tensor | None) -> Callable[[], None]:
        """Put a weight in place, and a bias unless it is None. Return what puts those back that were there."""
        return set_values_(self.module, {self.name: weight} | ({} if bias is None else {"bias": bias}))

    def runs_once(self, base: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
        """Return whether a pass runs it just once, as where no layers share it; a pass tells, the first time."""
        if self._runs is None:
            calls: list[int] = []
            handle = self.module.register_forward_pre_hook(lambda *_: calls.append(1))
            try:
                base(**batch)
            finally:
                handle.remove()
            self._runs = len(calls)
        return self._runs == 1

    def stays(self, kept: Tensor) -> Tensor:
        """Return which inputs come from the units in `kept` (bool `[units]`), or from none."""
        return (self.owners == NOBODY) | kept[self.owners.clamp(min=0)]

    def refitted(self, fit: Fit, stays: Tensor, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias that a fit gives, the rows of what goes as they are."""
        change, (before, bias) = fit.change(ridge), self.values
        weight = before.to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.by_inputs(weight)[stays] = (self.rows(stays) + change).to(weight)
        shift = fit.shift(change)
        moved = None if bias is None or shift is None else (bias.cpu().double() + shift).to(bias)
        return weight.to(before), moved


@dataclass
class Moments:
    """Of the inputs x of a projection over `count` tokens: `gram` = Σ x xᵀ `[inputs, inputs]`, and `total` = Σ x."""

    gram: Tensor
    total: Tensor
    count: int

    @classmethod
    def over(cls, rows: Tensor) -> Moments:
        """Return the moments over no token, to which rows like these can be added."""
        return cls(rows.new_zeros(rows.shape[1], rows.shape[1]), rows.new_zeros(rows.shape[1]), 0)

    def add(self, rows: Tensor) -> None:
        """Take in tokens, `[tokens, inputs]`, in place: of thousands of neurons a second sum is large."""
        with without_autocast(rows.device):
            self.gram.addmm_(rows.T, rows)
        self.total += rows.sum(dim=0)
        self.count += len(rows)


class Fit:
    """What moments say of making up for the inputs that go, by those in `stays` (bool `[inputs]`).

    With K and R the inputs that stay and go, the squared difference between x W and x_K (W_K + D) + d, summed over
    tokens, is least for D = (C_KK + ridge)⁻¹ C_KR W_R and d = m_R W_R − m_K D, where m is the mean and C the second
    moment about it. Without a bias d is 0, and C the second moment about 0. `gone` is W_R `[gone, model width]`, in
    float64.

    What it keeps are sums over tokens of the inputs that stay; the moments need not be kept.
    """

    def __init__(self, moments: Moments, stays: Tensor, gone: Tensor, with_bias: bool) -> None:
        self.stays, self.with_bias, self.count = stays, with_bias, moments.count
        self.total, self.trace = moments.total.double(), float(moments.gram.diagonal().double().sum())
        self.written, self.lost = self.total[~stays] @ gone, 0.0
        # Some inputs at a time, as all of them in float64 would take more memory than what is kept.
        across, parts = [], stays.split(256)
        for some, here, own in zip(
            moments.gram.split(256), parts, gone.split([int((~part).sum()) for part in parts]), strict=True
        ):
            written = some[:, ~stays].double() @ gone
            self.lost += float((own * written[~here]).sum())
            across.append(written[here])
        kept = stays.nonzero()
        self.across, self.among = torch.cat(across), moments.gram[kept, kept.T]

    def __iadd__(self, other: Fit) -> Fit:
        """Take in the tokens of another of the same inputs, in place."""
        for name in ("count", "total", "trace", "written", "lost", "across", "among"):
            mine = getattr(self, name)
            mine += getattr(other, name)
            setattr(self, name, mine)
        return self

    @property
    def unit(self) -> float:
        """The mean over all inputs of their second moment, summed over tokens."""
        about = float(self.total.square().sum()) / max(self.count, 1) if self.with_bias else 0.0
        return (self.trace - about) / len(self.total)

    def change(self, ridge: float) -> Tensor:
        """Return D; `ridge` is in units of the mean second moment. 0 where inputs vary by less than their rounding."""
        # In place, which needs matrices column by column: of thousands of neurons each more is large.
        loaded = self.among.to(torch.float64, copy=True).addr_(self._mean, self._mean, alpha=-self.count).T
        loaded.diagonal().add_(ridge * self.unit)
        change = self.across.addr(self._mean, self.written, alpha=-1).T
        factor, failed = torch.linalg.cholesky_ex(loaded, out=(loaded, torch.empty((), dtype=torch.int32)))
        if int(failed):
            return torch.zeros_like(self.across)
        torch.linalg.solve_triangular(factor.T, change, upper=True, left=False, out=change)
        return torch.linalg.solve_triangular(factor, change, upper=False, left=False, out=change).T

    def shift(self, change: Tensor) -> Tensor | None:
        """Return d for D, None without a bias."""
        return self.written / max(self.count, 1) - self._mean @ change if self.with_bias else None

    def error(self, change: Tensor) -> float:
        """Return what is left of the squared difference with D, and d where there is a bias."""
        about = float(self.written.square().sum()) / max(self.count, 1) if self.with_bias else 0.0
        by_mean = self._mean @ change
        left = self.lost - about - self.count * float(by_mean.square().sum()) + 2 * float(by_mean @ self.written)
        for some, across, own in zip(self.among.split(256), self.across.split(256), change.split(256), strict=True):
            left += float((own * (some.double() @ change - 2 * across)).sum())
        return left

    @property
    def _mean(self) -> Tensor:
        """What second moments are about, of the inputs that stay: their mean, 0 without a bias."""
        return self.total[self.stays] / max(self.count, 1) * self.with_bias


class _Reached(Exception):
    """The projection has read; nothing after it matters."""


def moments_of(
    base: PreTrainedModel,
    projection: Projection,
    prefix: Prefix,
    reading: Reading,
    numbers: Sequence[int] | None = None,
) -> Moments | None:
    """Return the moments of what a projection is given, on the CPU; None where no batch reaches it.

    Of the batches of `prefix` with these numbers, or all. Passes begin and end with the layer that it lies in, where
    there is one; else they end at the projection, unless layers share it and it runs again. One site's moments are
    there at a time, so that memory does not grow with the number of sites.
    """
    layer = prefix.layer_of(projection.path)
    ends = layer is None and projection.runs_once(base, prefix.batches[0])

    def read(number: int) -> list[Tensor]:
        batch = prefix.batches[number]
        with prefix.passing(number, projection.path), _reading(projection, batch, ends, layer) as found:
            try:
                base(**batch)
            except _Reached:
                put_away_(base)
        return [rows.cpu() for rows in found] if is_shared(reading.accelerator) else found

    moments: Moments | None = None
    for found in in_order(read, range(len(prefix.batches)) if numbers is None else numbers, reading.accelerator):
        for rows in found:
            moments = Moments.over(rows) if moments is None else moments
            moments.add(rows)
    return None if moments is None else Moments(moments.gram.cpu(), moments.total.cpu(), moments.count)


@contextmanager
def _reading(
    projection: Projection, batch: Mapping[str, Any], ends: bool, layer: nn.Module | None = None
) -> Iterator[list[Tensor]]:
    """Within this context a pass adds what the projection is given, `[tokens, inputs]`, to what is yielded.

    It ends at once where that `ends` it, and with the `layer` where there is one.
    """
    found: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach().float()
        found.append(rows_of_tokens(taken, projection.channels, batch.get("attention_mask")))
        if ends:
            raise _Reached

    def end(*_: object) -> None:
        raise _Reached

    handles = [projection.module.register_forward_pre_hook(read, with_kwargs=True)]
    if layer is not None:
        handles.append(layer.register_forward_hook(end))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
