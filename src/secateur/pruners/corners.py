"""The meta-pruner's network on short maps: only the corner that a map fills is computed, to the same values.

A map of a text shorter than 128 tokens lies in the upper left corner of zeros. A feature that sees no part of the
corner is that of a map of zeros, which is computed once for all maps. In every layer only the others are computed, from
the corner's features and as many of the zero map's around them as they see.

BatchNorm in training mode takes its statistics over whole maps: the zero map's features count there as often as there
are maps that have them. So gradients too are those of maps padded to 128 × 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 128
"""Rows and columns of the map that the network reads."""


def score_corners(network: nn.Sequential, corners: Sequence[Tensor]) -> list[Tensor]:
    """Return what the network makes of maps in the corner of zeros: `[maps, 2]` in (0, 2) for each set of maps.

    `corners` are sets of maps `[maps, rows, columns]`, each set of a size of its own. In training mode all sets share
    BatchNorm's statistics, as if they were one batch.
    """
    *layers, last, sigmoid = network
    zero = corners[0].new_zeros(1, 1, SIZE, SIZE)
    # Channels last makes these convolutions about twice as fast on a CPU; the values are the same.
    sets = [maps.unsqueeze(1).to(memory_format=torch.channels_last) for maps in corners]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            sets = [_convolved(layer, zero, x) for x in sets]
            zero = layer(zero)
        elif isinstance(layer, nn.BatchNorm2d) and layer.training:
            zero, *sets = _normalised(layer, zero, sets)
        elif isinstance(layer, nn.LeakyReLU):  # in place: nothing else holds what a convolution or BatchNorm returned
            zero, *sets = (nn.functional.leaky_relu_(x, layer.negative_slope) for x in (zero, *sets))
        else:
            zero, *sets = (layer(x) for x in (zero, *sets))
    return [2 * sigmoid(last(_LaidOn.apply(zero, x, 0))).flatten(1) for x in sets]


def _convolved(layer: nn.Conv2d, zero: Tensor, corners: Tensor) -> Tensor:
    """Return the features that see some of the corners. Kernel 4, stride 2, padding 1: i sees 2 i - 1 to 2 i + 2."""
    size = zero.shape[-1]
    rows, columns = (min(2 * (length // 2 + 1) + 1, size) for length in corners.shape[2:])
    # The padding beyond an edge that is seen is part of the ground.
    ground = nn.functional.pad(zero[..., :rows, :columns], (1, int(columns == size), 1, int(rows == size)))
    return nn.functional.conv2d(_LaidOn.apply(ground, corners, 1), layer.weight, stride=2)


class _LaidOn(torch.autograd.Function):
    """Lay each of the corners on the ground `[1, channels, rows, columns]`, `place` rows and columns from its corner.

    A function of its own, since autograd would copy the gradient of what is written over.
    """

    @staticmethod
    def forward(ctx: Any, ground: Tensor, corners: Tensor, place: int) -> Tensor:
        ctx.slices = tuple(slice(place, place + length) for length in corners.shape[2:])
        laid = ground.expand(len(corners), -1, -1, -1).clone(memory_format=torch.channels_last)
        laid[(..., *ctx.slices)] = corners
        return laid

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_ground = None
        if ctx.needs_input_grad[0]:
            of_ground = gradient.sum(dim=0, keepdim=True)
            of_ground[(..., *ctx.slices)] = 0
        return of_ground, gradient[(..., *ctx.slices)], None


def _normalised(layer: nn.BatchNorm2d, zero: Tensor, sets: Sequence[Tensor]) -> list[Tensor]:
    """Do what BatchNorm does in training mode with whole maps, and return the zero map and the sets."""
    outside = torch.zeros_like(zero[0, 0])  # how many maps have the zero map's feature at a place
    for x in sets:
        outside += len(x)
        outside[: x.shape[2], : x.shape[3]] -= len(x)
    weights = outside.flatten().unsqueeze(1)  # features one a row, as places follow each other in channels-last memory
    made = _WeightedBatchNorm.apply(layer.weight, layer.bias, layer.eps, weights, *(_as_rows(x) for x in (zero, *sets)))
    mean, variance, *rows = made
    _remember(layer, mean, variance, zero[0, 0].numel() * sum(map(len, sets)))
    return [_as_maps(row, x) for row, x in zip(rows, (zero, *sets), strict=True)]


def _as_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(len(like), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)


@torch.no_grad()
def _remember(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as BatchNorm does: by the momentum, with the unbiased variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    assert layer.momentum is not None
    layer.num_batches_tracked += 1
    layer.running_mean.lerp_(mean, layer.momentum)
    layer.running_var.lerp_(variance * count / max(1, count - 1), layer.momentum)


class _WeightedBatchNorm(torch.autograd.Function):
    """Normalise rows `[places, channels]` by the mean and variance of all, where the first rows have weights.

    Takes gain, bias, epsilon, weights `[places, 1]` of the first rows, and the rows. Returns mean, variance and rows.
    Of one function, since autograd would keep four more copies of every feature.
    """

    @staticmethod
    def forward(ctx: Any, gain: Tensor, bias: Tensor, eps: float, weights: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        first, others = rows[0], rows[1:]
        count = weights.sum() + sum(map(len, others))
        mean = ((weights * first).sum(dim=0) + sum(x.sum(dim=0) for x in others)) / count
        centred = [x - mean for x in rows]
        squares = (weights * centred[0] ** 2).sum(dim=0) + sum(_products(x, x) for x in centred[1:])
        variance = squares / count
        scale = (variance + eps).rsqrt()
        for x in centred:
            x.mul_(scale)
        ctx.save_for_backward(gain, scale, weights, count, *centred)
        ctx.mark_non_differentiable(mean, variance)
        return mean, variance, *(torch.addcmul(bias, x, gain) for x in centred)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gain, scale, weights, count, *normalised = ctx.saved_tensors
        given = gradients[2:]
        of_bias = torch.stack([g.sum(dim=0) for g in given]).sum(dim=0)
        of_gain = torch.stack([_products(g, x) for g, x in zip(given, normalised, strict=True)]).sum(dim=0)
        shift, slope = of_bias / count, of_gain / count
        found = []
        for number, (g, x) in enumerate(zip(given, normalised, strict=True)):
            share = torch.addcmul(shift, x, slope)  # what a row has in the mean and the variance
            if number == 0:
                share.mul_(weights)
            found.append(share.neg_().add_(g).mul_(gain * scale))
        return of_gain, of_bias, None, None, *found


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum over rows of products, `[channels]`; a matrix product needs no memory for them."""
    return (one.T @ other).diagonal()
