"""What is drawn at random: tasks, sites that stay whole, heads to keep (paper, steps 1 and 3), and from what."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import invalid
from secateur.meta_training.config import MetaTrainingConfig
from secateur.units.masks import vector_of


def task_weights(sizes: Sequence[int], power: float = MetaTrainingConfig.task_power) -> list[int]:
    """Return how often each task is drawn, in proportion: floor(texts ** power), at least 1 (paper, step 1)."""
    if not sizes or min(sizes) < 1:
        raise invalid("sizes", "give at least one task, each with texts", list(sizes))
    return [max(1, math.floor(size**power + 1e-9)) for size in sizes]


def draw_whole_sites(num_sites: int, fraction: float, random: torch.Generator) -> set[int]:
    """Return which sites stay whole in this step, `floor(fraction · sites)` of them (paper, step 3)."""
    return set(torch.randperm(num_sites, generator=random)[: math.floor(fraction * num_sites + 1e-9)].tolist())


def draw_heads(
    scores: Tensor, num_kept: int, random: torch.Generator, temperature: float = MetaTrainingConfig.temperature
) -> Tensor:
    """Draw a gate of `num_kept` ones among the heads of one site, with straight-through gradients (paper, step 3).

    Hard Gumbel-softmax samples of `scores` `[heads]` (taken as logits) are united until `num_kept` distinct heads are
    in. Forward, the result is exactly 0 or 1; backward, each sample passes the gradient of its softmax. As in the
    authors' code the union is a maximum, so the gradient at a head reaches one of the samples that hold its value.

    Departure: the authors give up after 5 · heads samples and then keep fewer heads; here sampling goes on. Samples
    that repeat a head bring nothing to the union, and those after the last new head are never drawn.
    """
    if not 1 <= num_kept <= len(scores):
        raise invalid("num_kept", f"be from 1 to {len(scores)}", num_kept)
    samples: list[Tensor] = []
    chosen: set[int] = set()
    while len(chosen) < num_kept:
        # -log(-log u) of uniform u is Gumbel noise; a u of exactly 0 would be infinite.
        uniform = torch.rand(len(scores), generator=random).clamp_min(1e-20).to(scores.device)
        soft = ((scores - (-uniform.log()).log()) / temperature).softmax(dim=0)
        head = int(soft.argmax())
        chosen.add(head)
        hard = torch.zeros_like(soft)
        hard[head] = 1
        samples.append(hard - soft.detach() + soft)
    union = torch.stack(samples).max(dim=0).values
    # `hard - soft + soft` can miss 0 and 1 by a rounding error; the gates must be exact.
    exact = vector_of(sorted(chosen), len(scores)).to(union)
    return exact - union.detach() + union


def drop_dimensions(width: int, fraction: float, random: torch.Generator) -> Tensor:
    """Return a 0/1 mask over representation dimensions, `[width]`; each is dropped with probability `fraction`.

    Paper, step 5; one mask serves the dense and the pruned representations. Where chance drops all, one stays.
    """
    mask = (torch.rand(width, generator=random) >= fraction).float()
    if not bool(mask.any()):
        mask[int(torch.randint(width, (1,), generator=random))] = 1
    return mask
