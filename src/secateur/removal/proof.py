"""Is one model's output the other's? The comparison behind every removal and behind `secateur verify`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel

from secateur.errors import UnsupportedModelError, invalid
from secateur.models.base_model import base_of
from secateur.models.fetched import fetched
from secateur.models.finite import check_finite, tensors_of
from secateur.models.offload import device_of, is_offloaded
from secateur.models.state import evaluation_mode, hooked, without_autocast
from secateur.models.thresholds import long_example_inputs
from secateur.sites.gating import probe
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.sites.unit_gates import reached
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread

_PLAIN = {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}  # what can be told apart by token

FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What a model raises over inputs that do not suit it, and code that counts on all heads."""

_UNREADABLE = (*FAILURES, UnsupportedModelError)  # a text of which no proof tells

TOLERANCE = 1e-4
"""Largest difference in float32 that a proof accepts, relative to the largest output where that is above 1."""


@dataclass(frozen=True)
class Wanted:
    """What a cut model has to say of `inputs`: `outputs`, and those of a cached `step`, None where none runs."""

    inputs: Mapping[str, Any]
    outputs: list[Tensor]
    step: list[Tensor] | None

    def difference(self, base: PreTrainedModel) -> float:
        """Return the largest difference of what `base` says to it."""
        difference = largest_difference(self.outputs, hidden_states(base, self.inputs))
        if self.step is None:
            return difference
        return max(difference, largest_difference(self.step, cached_step(base, self.inputs) or []))


def wanted_of(base: PreTrainedModel, inputs: Mapping[str, Any], losing: Collection[Site]) -> list[Wanted]:
    """Return what a gated model says: of `inputs`, and of a long text where lengths matter to it.

    Raises `InvalidInputError` where `inputs` do not reach one of the sites that are `losing` units, and
    `UnsupportedModelError` for a parameter of one that no pass uses: whatever were cut there, all would seem equal.
    """
    found: set[str] = set()
    others = [site.name for site in losing if not isinstance(site, AttentionSite)]
    # Of a list of layers nothing is cut, but all goes.
    cut = {site.name: base.get_submodule(site.name) for site in losing if not isinstance(site, LayerSite)}
    with used_parameters(cut) as used:
        with probe(base, lambda reading: found.add(reading.site)), reached(base, others, found):
            outputs = hidden_states(base, inputs)
            for tensor in outputs:
                check_finite(tensor, base, partial(hidden_states, base, inputs))
        wanted = [Wanted(inputs, outputs, finite_step(base, inputs)), *_of_a_long_text(base)]
    for site in losing:
        if site.name not in found:
            rule = f"reach the site {site.name!r}, which loses units"
            raise invalid("inputs", rule, list(inputs), "pass `inputs` that reach it")
        if site.name in cut:
            _check_all_used(cut[site.name], site, used[site.name])
    return wanted


def finite_step(base: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor] | None:
    """Return what `cached_step` does of a whole model; None also where it fails or is not finite."""
    try:
        step = cached_step(base, inputs)
    except FAILURES:  # with these inputs the whole model has no such step either
        return None
    # It is not finite where the first token, all that the cache holds, is padding.
    return step if step is not None and _all_finite(step) else None


def _of_a_long_text(base: PreTrainedModel) -> list[Wanted]:
    """Return what the model says of a text past every threshold in its config, where there is one that it can read."""
    try:
        inputs = long_example_inputs(base)
        outputs = [] if inputs is None else hidden_states(base, inputs)
    except _UNREADABLE:
        return []
    return [Wanted(inputs, outputs, finite_step(base, inputs))] if inputs is not None and _all_finite(outputs) else []


def _all_finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _check_all_used(module: nn.Module, site: Site, used: Collection[str]) -> None:
    """Raise `UnsupportedModelError` for a parameter of the site's module that units may own and that is not `used`."""
    for name, parameter in module.named_parameters():
        if name not in used and any(size % site.num_groups == 0 for size in parameter.shape):
            raise UnsupportedModelError(
                f"site {site.name}: no pass of the proof uses its parameter {name} of shape {tuple(parameter.shape)}, "
                "and units may own parts of it; pass `inputs` that use it, leave the site whole, or gate its units "
                "with `secateur.gated`"
            )


@torch.no_grad()
def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return every floating-point tensor that the base model returns for `inputs`, attention maps aside, dropout off.

    Maps have an axis of heads, and some models return them unasked (BridgeTower); what they do shows in the rest.
    Random numbers that the model draws all the same (VITS adds noise, ViT-MAE hides patches) are the same at every
    call; the caller's generators are left as they were, and its autocast is off meanwhile.
    """
    base = base_of(model)
    with _repeatable(base):
        return tensors_of(base(**inputs))


@torch.no_grad()
def cached_step(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor] | None:
    """Return what the base model says of all tokens but the first, which it has read before and cached.

    A cache is told of its tokens layer by layer, so that a model may be right without one and wrong with it. None where
    the model keeps no cache for `inputs`, which one token shows, or they hold more than token ids and their mask.
    """
    base = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    if not {"past_key_values", "use_cache"} <= accepted.keys() or name not in inputs or not inputs.keys() <= _PLAIN:
        return None
    given, tokens = {**inputs, "use_cache": True}, inputs[name]
    start = {**given, name: tokens[:, :1]}
    if name == "input_ids" and isinstance(given.get("attention_mask"), Tensor):
        start["attention_mask"] = given["attention_mask"][:, :1]
    with _repeatable(base):
        cache = getattr(base(**start), "past_key_values", None)
        if not isinstance(cache, Cache) or tokens.shape[1] < 2:
            return None
        step = base(**{**given, name: tokens[:, 1:]}, past_key_values=cache)
    return tensors_of({key: value for key, value in step.items() if key != "past_key_values"})


@undoing
def _repeatable(base: PreTrainedModel) -> Iterator[None]:
    """Within this context a pass computes the same every time: no dropout, no autocast, the same random numbers."""
    with evaluation_mode(base), without_autocast(device_of(base)):
        torch.manual_seed(0)
        yield


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference of two lists of tensors, divided by the largest value where above 1.

    NaN and infinity anywhere, or other shapes, count as an infinite difference.
    """
    if [t.shape for t in one] != [t.shape for t in other] or not one:
        return math.inf
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        scale = max(1.0, float(a.double().abs().max()) if a.numel() else 1.0)
        if not math.isfinite(difference) or not math.isfinite(scale):
            return math.inf
        worst = max(worst, difference / scale)
    return worst


@undoing
def used_parameters(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, set[str]]]:
    """Note meanwhile, by the path of each module, which of its parameters take part in a computation, by their names.

    What no pass of a proof uses, such as a weight for longer texts, no proof says anything of. What is yielded is whole
    once the block is left.
    """
    found: dict[str, set[str]] = {path: set() for path in modules}
    with _UsedParameters() as used:
        with ExitStack() as stack:
            for path, module in modules.items():
                if is_offloaded(module):
                    stack.enter_context(_noted_when_it_has_run(module, used, found[path]))
            yield found
        for path, module in modules.items():
            if not is_offloaded(module):  # what stands in for fetched ones is used to fetch them
                found[path] |= used.of(module)


@undoing
def _noted_when_it_has_run(module: nn.Module, used: _UsedParameters, found: set[str]) -> Iterator[None]:
    """Note which parameters of a module were used while they are there: fetched ones are others at every run."""
    running = ExitStack()

    def enter(*_: object) -> None:
        running.enter_context(fetched(module))
        used.ids -= {id(parameter) for parameter in module.parameters()}  # to be fetched is no use of the numbers

    def leave(*_: object) -> None:
        found.update(used.of(module))
        running.close()

    with hooked(
        hook(in_own_thread(call), prepend=call is enter)
        for hook, call in ((module.register_forward_pre_hook, enter), (module.register_forward_hook, leave))
    ):
        try:
            yield
        finally:
            running.close()


class _UsedParameters(TorchFunctionMode):
    """Within this context the parameters that take part in a computation are noted, by id, also without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def of(self, module: nn.Module) -> set[str]:
        """Return the names of the module's parameters that were used."""
        return {name for name, parameter in module.named_parameters() if id(parameter) in self.ids}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # To ask for a shape, dtype or device is no use of the numbers.
        if isinstance(result, Tensor | tuple | list) and not isinstance(result, torch.Size):
            self._note(args)
            self._note(kwargs.values())
        return result

    def _note(self, taken: Iterable[Any]) -> None:
        for value in taken:
            if isinstance(value, nn.Parameter):
                self.ids.add(id(value))
            elif isinstance(value, tuple | list):
                self._note(value)
