"""What a model costs: heads, parameters, multiply-accumulates, and latency of models measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError
from secateur.measuring.timing import time_in_turn
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs, max_length
from secateur.models.state import evaluation_mode, frozen, held
from secateur.sites.gating import count_heads, probe
from secateur.sites.recipe import read_recipe
from secateur.support.interrupts import interruptible, undoing
from secateur.support.threads import in_own_thread


@dataclass(frozen=True)
class ModelCost:
    """Query heads, parameters (shared ones counted once), and multiply-accumulates of one forward pass.

    `batch` and `length` say which pass: text of `batch` × `length` tokens, or images or sounds of the model's size.
    """

    heads: int
    parameters: int
    macs: int
    batch: int
    length: int

    def to_json(self) -> dict[str, int]:
        """Return plain JSON data."""
        return asdict(self)


@interruptible
def measure_cost(model: nn.Module, batch: int = 1, length: int = 128) -> ModelCost:
    """Count heads, parameters and multiply-accumulates (half of PyTorch's flop count) of the base model.

    `length` is cut to what the model's positions allow.
    """
    base = base_of(model)
    macs, length = count_macs(base, batch, length)
    heads = sum(h for h, _ in count_heads(base, example_inputs(base, 1)).values())
    return ModelCost(heads, count_parameters(model), macs[""], batch, length)


def check_heads(model: nn.Module, heads: int) -> None:
    """Raise `UnsupportedModelError` where pruning has left no head: of nothing there is no share that could go or stay.

    A model that never had one is refused where its heads are looked for.
    """
    if not heads and read_recipe(base_of(model).config) is not None:
        raise UnsupportedModelError(
            f"{type(base_of(model)).__name__} has no attention heads left to remove; prune the model that it was made "
            "from"
        )


def count_macs(base: PreTrainedModel, batch: int = 1, length: int = 128) -> tuple[dict[str, int], int]:
    """Return multiply-accumulates of one pass inside each module, by its name ("" = all of them), and its length."""
    length = min(length, max_length(base, length))
    inputs = example_inputs(base, batch, length, padding=0)
    counter = FlopCounterMode(display=False)
    tracker = counter.mod_tracker  # its hooks are those of every module of the process
    for hook in ("_fw_pre_hook", "_fw_post_hook"):
        setattr(tracker, hook, in_own_thread(getattr(tracker, hook)))
    # PyTorch counts matrix products but no fused attention, so the pass is made with separate products. Its counter
    # wants a graph behind every tensor that asks for gradients, and modules may be handed bare parameters.
    with held(base), evaluation_mode(base), frozen(base), _separate_products(base), counter:
        base(**inputs)
    root = type(base).__name__ + "."
    found = {name.removeprefix(root): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {**found, "": counter.get_total_flops() // 2}, length


@undoing
def _separate_products(base: PreTrainedModel) -> Iterator[None]:
    """Let attention multiply matrices one by one meanwhile, in PyTorch's own function or in the model's."""
    fused = getattr(base.config, "_attn_implementation", None) not in (None, "eager", "sdpa")
    with _InTheOpen(), probe(base, weights=True) if fused else nullcontext():
        yield


def _first(args: Any, kwargs: Any) -> Tensor:
    query: Tensor = args[0] if args else kwargs["query"]
    return query


class _InTheOpen(TorchFunctionMode):
    """PyTorch's attention by separate products, in this thread: its own switch is one for the whole process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and _first(args, kwargs).numel():
            return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]
        return func(*args, **kwargs)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


@interruptible
@torch.no_grad()
def compare_latency(
    models: Mapping[str, nn.Module], batch: int = 8, length: int = 128, rounds: int = 12, progress: bool = False
) -> dict[str, list[float]]:
    """Time one forward pass of each model in turn, round after round, and return the seconds of every round.

    Quote ratios of medians: see `time_in_turn`.
    """
    bases = [base_of(model) for model in models.values()]
    with ExitStack() as modes:
        for base in bases:
            modes.enter_context(evaluation_mode(base))
        runs = {name: forward_pass(base, batch, length) for name, base in zip(models, bases, strict=True)}
        return time_in_turn(runs, rounds, progress=progress)


def forward_pass(model: nn.Module, batch: int, length: int) -> Callable[[], Any]:
    """Return a call that runs the base model on made-up text of `batch` × `length` tokens, cut to its positions."""
    base = base_of(model)
    inputs = example_inputs(base, batch, min(length, max_length(base, length)), padding=0)
    return lambda: base(**inputs)
