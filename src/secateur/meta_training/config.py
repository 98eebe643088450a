"""The settings of a meta-training; their defaults are the paper's. Importing this is cheap: the command reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from secateur.errors import invalid

Signal = Literal["straight_through", "leave_one_out", "random_masks"]


@dataclass(frozen=True)
class MetaTrainingConfig:
    """Settings of a meta-training; the defaults are the paper's.

    steps: optimiser updates. batch_size: texts a batch. batches_per_step: batches whose gradients are averaged in one
    update. max_length: tokens a text. optimizer: "sgd" (no momentum) or "adam". clip: largest gradient norm.
    pruning_ratio: share of heads dropped in each site that is cut. whole_sites: share of sites that stay whole in a
    step. temperature: of the Gumbel-softmax. dropped_dimensions: share of representation dimensions left out of a
    batch's loss. single_weight: factor on the loss of single-sentence tasks. task_power: tasks are drawn in proportion
    to floor(texts ** task_power). task_sizes: how many texts each task counts as having, in order, where what is given
    is a part of it; none = as many as are given. With a `task_power` of 1 these are the weights themselves.
    initial_std: of the convolutions' start.

    signal (a departure where it is not the paper's "straight_through"): "leave_one_out" and "random_masks" teach the
    scores to rank heads, in each site, as an estimate of their importance on the same batch does. The estimate is the
    relational KL when a head alone is gated, or the mean KL of random masks without the head less that of masks with
    it. random_masks: how many of those, in pairs of a mask and its complement. pool: batches for each task that are
    drawn again and again, so that their estimates are made once; 0 = fresh texts at every draw.
    """

    steps: int = 6000
    batch_size: int = 60
    batches_per_step: int = 8
    max_length: int = 128
    learning_rate: float = 0.02
    optimizer: Literal["sgd", "adam"] = "sgd"
    clip: float = 1.0
    pruning_ratio: float = 0.5
    whole_sites: float = 0.5
    temperature: float = 1.0
    dropped_dimensions: float = 0.8
    single_weight: float = 10.0
    task_power: float = 0.2
    task_sizes: tuple[int, ...] = ()
    signal: Signal = "straight_through"
    random_masks: int = 72
    pool: int = 0
    initial_std: float = 0.01
    seed: int = 0
    evaluate_every: int = 100
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        from secateur.relations import RELATED  # here, as it imports torch

        sizes = self.task_sizes
        if not isinstance(sizes, list | tuple) or not all(type(size) is int and size > 0 for size in sizes):
            raise invalid("task_sizes", "hold a whole number from 1 for each task", sizes)
        object.__setattr__(self, "task_sizes", tuple(sizes))  # a list is what JSON makes of it
        if not self.task_power >= 0:
            raise invalid("task_power", "be at least 0", self.task_power)
        for name in ("steps", "batch_size", "batches_per_step", "max_length", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise invalid(name, "be a whole number from 1", value)
        for name in ("learning_rate", "clip", "temperature", "single_weight", "initial_std"):
            if not getattr(self, name) > 0:
                raise invalid(name, "be above 0", getattr(self, name))
        if not 0 < self.pruning_ratio < 1:
            raise invalid("pruning_ratio", "be in (0, 1)", self.pruning_ratio)
        for name in ("whole_sites", "dropped_dimensions"):
            if not 0 <= getattr(self, name) < 1:
                raise invalid(name, "be in [0, 1)", getattr(self, name))
        if self.batch_size < RELATED:
            raise invalid("batch_size", f"be at least {RELATED}: fewer texts have no relations", self.batch_size)
        if self.signal not in get_args(Signal):
            raise invalid("signal", f"be one of {', '.join(get_args(Signal))}", self.signal)
        if self.optimizer not in ("sgd", "adam"):
            raise invalid("optimizer", "be 'sgd' or 'adam'", self.optimizer)
        if self.random_masks < 2 or self.random_masks % 2 or self.pool < 0:
            raise invalid(
                "random_masks", "be even and at least 2, and `pool` at least 0", (self.random_masks, self.pool)
            )
