"""What each head of an attention block computes with weights of its own, as parts whose ownership can be asked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError
from secateur.sites.gating import HeadReading
from secateur.sites.ownership import Part, only


def parts_of(reading: HeadReading) -> list[Part]:
    """Return what each head computed, query, key and value apart where they can be; nothing without heads."""
    if not reading.outputs.shape[2]:
        return []
    if reading.query is None or reading.key is None or reading.value is None:
        # The scores too: a softmax is blind to what it adds to a whole row, so the outputs do not show the key's bias.
        assert reading.scores is not None
        return [Part.along_first_axis("head", reading.scores.movedim(1, 0), reading.outputs.movedim(2, 0))]
    return [
        Part.along_first_axis(role, tensor.movedim(1, 0))
        for role, tensor in (("query", reading.query), ("key", reading.key), ("value", reading.value))
    ]


def learned_extras_of(reading: HeadReading) -> list[Part]:
    """Return what else the attention function takes for each head: sinks `[heads]`, a learned bias `[batch, heads, …]`.

    It is counted with the query, as there is an entry for each query head.
    """
    found = []
    for tensor in reading.extras:
        axis = 0 if tensor.ndim == 1 else 1
        if tensor.shape[axis] == reading.outputs.shape[2] > 0:
            found.append(Part.along_first_axis("query", tensor.movedim(axis, 0)))
    return found


def written_part(projection: nn.Module, outputs: Tensor, taken: Tensor, random: torch.Generator) -> Part:
    """Return what the output projection writes for each head, with noise in place of what the head computed.

    `outputs` `[batch, queries, heads, width]` are the heads', and `taken`, of as many numbers, is what `projection`
    takes: the heads side by side.
    """

    def computed_by(chosen: Tensor) -> list[Tensor]:
        noise = only(chosen, torch.randn(outputs.shape, generator=random), axis=2)
        return [projection.forward(noise.reshape(taken.shape).to(taken))]

    return Part("output", outputs.shape[2], computed_by)


def count_key_value_heads(reading: HeadReading) -> int:
    """Return the number of key-value heads. Raises `UnsupportedModelError` where query heads do not share them."""
    heads = reading.outputs.shape[2]
    if reading.key is None:
        return heads
    kv_heads = reading.key.shape[1]
    if kv_heads and heads % kv_heads:
        raise UnsupportedModelError(
            f"site {reading.site}: {heads} heads do not divide among {kv_heads} key-value heads"
        )
    if reading.value is not None and reading.value.shape[1] != kv_heads:
        raise UnsupportedModelError(
            f"site {reading.site}: {kv_heads} key heads and {reading.value.shape[1]} value heads do not pair up"
        )
    return kv_heads
