"""Borrowing a model: every change made for a measurement is undone, also after an exception."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.fetched import in_float32_where_it_runs
from secateur.models.offload import HALVES, check_reachable, device_of, is_offloaded
from secateur.support.interrupts import undoing
from secateur.support.threads import in_own_thread, is_own

_holders: dict[int, tuple[int, int]] = {}  # id of a model or config → the thread that holds it, and how often
_lock = threading.Lock()


@undoing
def held(model: nn.Module) -> Iterator[None]:
    """Keep a model, and others that share a config with it, for this thread meanwhile; it may do so again inside.

    What a measurement switches is put back at its end, which two threads at a time would do in the wrong order. Raises
    `SecateurError` where another thread holds it.
    """
    base, thread = base_of(model), threading.get_ident()
    configs = (getattr(module, "config", None) for module in base.modules())
    keys = {id(base), *(id(config) for config in configs if config is not None)}
    with _lock:
        if any(_holders.get(key, (thread, 0))[0] != thread for key in keys):
            raise SecateurError("the model is in use in another thread; give each thread a copy of it, or wait")
        _holders.update({key: (thread, _holders.get(key, (thread, 0))[1] + 1) for key in keys})
    try:
        yield
    finally:
        with _lock:
            for key in keys:
                times = _holders.pop(key)[1]
                if times > 1:
                    _holders[key] = (thread, times - 1)


@undoing
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and running statistics off; modes, and random states, are afterwards what they were.

    Some models draw random numbers in every pass, from torch (ViT-MAE hides patches, VITS adds noise) or from numpy
    (VITS does that too). Whatever passes we make for a caller belong in here.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with random_states_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@undoing
def random_states_kept() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back at the end, and those of CUDA devices that are in use."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@undoing
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put every parameter's `.grad` aside, which training would add to and then drop, and back at the end."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@undoing
def gradients_for_all(model: nn.Module) -> Iterator[None]:
    """Let gradients reach every floating-point parameter, whatever the caller froze; `.grad` is never written.

    Raises `UnsupportedModelError` for weights made within `torch.inference_mode`, which gradients never reach.
    """
    check_takes_gradients(model)
    flags = _gradient_flags(model)
    try:
        for module, name, _ in flags:
            if getattr(module, name).is_floating_point():
                getattr(module, name).requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _put_back(flags)


@undoing
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients meanwhile, and record none."""
    flags = _gradient_flags(model)
    try:
        for module, name, _ in flags:
            getattr(module, name).requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        _put_back(flags)


def _gradient_flags(model: nn.Module) -> list[tuple[nn.Module, str, bool]]:
    """Return which parameters ask for gradients, by their module: those that are fetched are others after each pass."""
    return [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _put_back(flags: Iterable[tuple[nn.Module, str, bool]]) -> None:
    for module, name, flag in flags:
        if getattr(module, name).requires_grad != flag:
            getattr(module, name).requires_grad_(flag)


@undoing
def bfloat16_passes(base: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Let every pass of `base` compute its matrix products in bfloat16 meanwhile (torch.autocast); weights stay.

    It returns float32. What a `probe` reads is handed over outside of it, so that sums over texts are float32 too.
    """
    if not wanted:
        yield
        return
    kind = device_of(base).type
    running: list[torch.autocast] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append(torch.autocast(kind, torch.bfloat16))
        running[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        running.pop().__exit__(None, None, None)
        return convert_to_fp32(outputs)

    hooks = [
        base.register_forward_pre_hook(in_own_thread(enter)),
        base.register_forward_hook(in_own_thread(leave), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while running:  # after Ctrl-C within a pass, of which torch runs no hooks
            running.pop().__exit__(None, None, None)


@undoing
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks meanwhile, which are registered as `handles` is iterated over: give a generator."""
    with ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.remove)
        yield


@undoing
def weights_change(model: nn.Module) -> Iterator[None]:
    """Refuse passes of other threads that begin meanwhile, by `SecateurError`: they would see weights half changed."""
    thread = threading.get_ident()

    def refuse(*_: object) -> None:
        if not is_own(thread):
            raise SecateurError("the model's weights are being changed in another thread; run a copy of it, or wait")

    with hooked(one.register_forward_pre_hook(refuse, prepend=True) for one in [model]):
        yield


@undoing
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the dtype of the tensors meanwhile."""
    known = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if known else nullcontext():
        yield


def check_takes_gradients(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for weights made within `torch.inference_mode`, which gradients never reach."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError("the model was loaded within `torch.inference_mode`; load it outside of it")


def check_plain_weights(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for weights on the meta device, which are no numbers, and for quantised ones."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors) and not is_offloaded(model):
        raise UnsupportedModelError("the model's weights are on the meta device; load them before pruning")
    if (
        getattr(model, "is_quantized", False)
        or getattr(model, "hf_quantizer", None) is not None
        # What torchao and torch leave behind where they are called by hand; a DTensor is a plain one in pieces.
        or any(is_traceable_wrapper_subclass(t) and not _is_of(t, "torch.distributed") for t in tensors)
        or any(_is_of(module, "torch.ao.nn.quantized") for module in model.modules())
    ):
        raise UnsupportedModelError("the model is quantised; prune the full-precision model, then quantise the result")


def _is_of(thing: object, package: str) -> bool:
    return f"{type(thing).__module__}.".startswith(f"{package}.")


@undoing
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold half-precision weights in float32 meanwhile; widening and narrowing back is exact, so nothing changes.

    Their gradients are put aside, as a parameter takes none of another dtype, and come back where shapes still agree.
    Of a model whose weights are fetched when they run, each is widened on the way; no gradient reaches those. Raises
    what `check_reachable` and `check_plain_weights` raise, as such weights have no copy in float32.
    """
    check_plain_weights(model)
    if is_offloaded(model):
        check_reachable(model)
        with weights_change(model), in_float32_where_it_runs(model):
            yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [(t, t.dtype, t.grad) for t in tensors if t.dtype in HALVES]
    with weights_change(model) if narrow else nullcontext():
        yield from _widened(narrow)


def _widened(narrow: Sequence[tuple[Tensor, torch.dtype, Tensor | None]]) -> Iterator[None]:
    try:
        for tensor, _, _ in narrow:
            tensor.grad = None
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype, gradient in narrow:
            tensor.data = tensor.data.to(dtype)
            if gradient is not None and gradient.shape == tensor.shape:
                tensor.grad = gradient
