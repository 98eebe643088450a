"""Attention that a model computes itself, past transformers' attention interface (MPNet, DeBERTa, Bloom, Falcon …).

Nothing is known by name. A first pass watches every softmax over three or four dimensions and every fused attention
call, and then the linear layers: where the chunk of a layer's input that would be head h changes with head h's map and
with no other's, that layer is the output projection. From then on its input *is* the concatenated heads: hooks read it
there and gates multiply it there. Maps are the softmax results themselves, where the model computes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedModelError
from secateur.models.inputs import example_inputs
from secateur.models.state import evaluation_mode, gradients_for_all, hooked
from secateur.sites.binary_codes import sets_of_units
from secateur.sites.forward import is_emptied
from secateur.sites.ownership import only
from secateur.support.interrupts import interruptible, undoing
from secateur.support.threads import in_own_thread

_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)
_FUSED = torch.nn.functional.scaled_dot_product_attention

inside_interface = threading.local()
"""`active` is True while a function of the attention interface runs: what it computes is seen by the interface."""


@dataclass(frozen=True, eq=False)
class Computed:
    """What a softmax or a fused call computed: `result`, and the `operands` it did so from.

    A softmax has one operand, the scores, and its result is the map; a fused call has query, key and value.
    """

    result: Tensor
    operands: tuple[Tensor, ...]

    @property
    def is_map(self) -> bool:
        """Is the result an attention map, rather than the heads' outputs?"""
        return len(self.operands) == 1


Read = Callable[[str, nn.Module, Tensor, Computed], Tensor]


@dataclass(frozen=True)
class DirectSite:
    """An attention block outside the interface: the module that computes maps, and the layer that reads its heads."""

    name: str
    output: str


# What was found in which model, and what modules it had then; None where it did not run on example inputs.
_known: WeakKeyDictionary[nn.Module, tuple[list[str], dict[str, DirectSite] | None]] = WeakKeyDictionary()


def is_known(base: PreTrainedModel) -> bool:
    """Has this model been looked at, with the modules that it has now?"""
    return base in _known and _known[base][0] == _names(base)


def known_sites(base: PreTrainedModel) -> dict[str, DirectSite] | None:
    """Return the sites outside the interface by name; None where that is not known."""
    return _known[base][1] if is_known(base) else None


def _names(base: PreTrainedModel) -> list[str]:
    return [name for name, _ in base.named_modules()]


@interruptible
def look_for_sites(base: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
    """Run `base` once, on `inputs` (keyword arguments, example inputs where absent), and remember its sites.

    To be called while the interface's functions are ours, which tell by `inside_interface` what is theirs.
    """
    found = known_sites(base)
    try:
        new = _look(base, example_inputs(base) if inputs is None else inputs)
        found = {**(found or {}), **new}  # other inputs may reach other parts
    except Exception:  # whatever a model's own code raises over inputs that do not suit it
        pass
    _known[base] = (_names(base), found)


@undoing
def watch(base: PreTrainedModel, sites: Mapping[str, DirectSite], read: Read, reached: set[str]) -> Iterator[None]:
    """Within this context `read(site, module, outputs, computed)` is called at each site, and replaces `outputs`.

    `outputs` is `[batch, queries, heads, width]`, the concatenated heads; `computed` has `[batch, heads, …]` tensors.
    Some code goes past the interface with eager attention only (GPT-2, where it reorders): sites that are in `reached`
    went through it and were read there; they are taken out.
    """
    # An emptied block computes no map, and there is nothing to gate in it.
    sites = {name: site for name, site in sites.items() if not is_emptied(base.get_submodule(name))}
    if not sites:
        yield
        return
    seen: dict[str, Computed] = {}
    with ExitStack() as stack:
        modules = {name: base.get_submodule(name) for name in sites}
        stack.enter_context(_Watcher(modules, seen.__setitem__))
        for site in sites.values():
            hook = in_own_thread(_reader(site.name, modules[site.name], seen, read, reached))
            stack.callback(base.get_submodule(site.output).register_forward_pre_hook(hook).remove)
        yield


def _reader(
    site: str, module: nn.Module, seen: dict[str, Computed], read: Read, reached: set[str]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    other_inputs = UnsupportedModelError(
        f"site {site} attends in another way with these inputs than with those on which its heads were found"
    )

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        computed = seen.pop(site, None)
        if computed is None and site in reached:
            reached.discard(site)
            return None
        if computed is None:  # to pass over it would be to ignore a gate without a word
            raise other_inputs
        by_head = _by_head(computed.result, args[0])
        if by_head is None:
            raise other_inputs
        batch, heads, queries = by_head.shape[:3]
        outputs = args[0].reshape(batch, queries, heads, args[0].shape[-1] // max(heads, 1))
        operands = tuple(t.reshape(batch, -1, *t.shape[-2:]) if heads else t for t in computed.operands)
        changed = read(site, module, outputs, Computed(by_head, operands))
        return None if changed is outputs else (changed.reshape(args[0].shape), *args[1:])

    return hook


class _Watcher(TorchFunctionMode):
    """Reports every softmax and fused attention call to `found`, with the innermost of `modules` that makes it."""

    def __init__(self, modules: Mapping[str, nn.Module], found: Callable[[str, Computed], None]) -> None:
        super().__init__()
        self.modules, self.found = modules, found
        self.running: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _Watcher:
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(in_own_thread(self._enter_module(name)), prepend=True))
            self.handles.append(module.register_forward_hook(in_own_thread(self._leave_module), always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def _enter_module(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.append(name)

        return hook

    def _leave_module(self, *_: Any) -> None:
        if self.running:
            self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (
            (func in _SOFTMAX or func is _FUSED)
            and self.running
            and not getattr(inside_interface, "active", False)
            and isinstance(result, Tensor)
            and result.ndim >= 3
        ):
            names = ("query", "key", "value") if func is _FUSED else ("input",)
            operands = [*args[: len(names)], *(kwargs[name] for name in names[len(args) :])]
            self.found(self.running[-1], Computed(result, tuple(operands)))
        return result


def _by_head(result: Tensor, read: Tensor) -> Tensor | None:
    """View a map or a fused result as `[batch, heads, queries, …]`, if `read` can be its heads side by side."""
    if result.ndim == 3:  # batch and heads as one dimension
        if read.ndim != 3 or not read.shape[0] or result.shape[0] % read.shape[0]:
            return None
        result = result.view(read.shape[0], result.shape[0] // read.shape[0], *result.shape[1:])
    if result.ndim != 4:
        return None
    batch, heads, queries = result.shape[:3]
    divides = read.shape[-1] % heads == 0 if heads else not read.shape[-1]
    return result if divides and read.shape[:-1].numel() == batch * queries else None


def _look(base: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, DirectSite]:
    """Run `base` once and return the sites whose heads can be told apart in the input of a linear layer."""
    search = _Search(base)
    hooks = (
        module.register_forward_pre_hook(in_own_thread(partial(search.read, name)))
        for name, module in search.modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2
    )
    with evaluation_mode(base), gradients_for_all(base), hooked(hooks), _Watcher(search.modules, search.see):
        base(**inputs)
    return {name: site for name, site in search.sites.items() if name not in search.unclear}


class _Search:
    """What a pass shows of attention outside the interface: maps, and the linear layers that read their heads."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules = dict(base.named_modules())
        self.parents = {name for name, module in self.modules.items() if any(True for _ in module.parameters())}
        self.sites: dict[str, DirectSite] = {}
        self.unclear: set[str] = set()  # more than one map for one set of heads: no gate would stand for the head
        self.pending: dict[str, Tensor] = {}

    def see(self, name: str, computed: Computed) -> None:
        """Take what a module computed: from now on a layer that reads its heads is awaited."""
        while name and name not in self.parents:  # an nn.Softmax is no attention block, what holds it is
            name = name.rpartition(".")[0]
        if name in self.pending:
            self.unclear.add(name)
        if computed.result.requires_grad:
            self.pending.clear()
            self.pending[name] = computed.result

    def read(self, layer: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Take the input of a linear layer: is it the heads that are awaited?"""
        for name, result in list(self.pending.items()):
            by_head = _by_head(result, args[0]) if args and isinstance(args[0], Tensor) else None
            if by_head is not None and reads_heads(result, args[0], by_head.shape[:3]):
                del self.pending[name]
                if name in self.sites and self.sites[name].output != layer:
                    self.unclear.add(name)
                self.sites[name] = DirectSite(name, layer)
                return
        # A layer that also reads something else would let an ungated part of the heads through (ProphetNet).
        self.unclear.update(name for name, site in self.sites.items() if site.output == layer)


def reads_heads(result: Tensor, read: Tensor, shape: Sequence[int]) -> bool:
    """Does each head's chunk of `read` depend on that head of `result`, and on no other?

    `shape` is `[batch, heads, queries]`; `result` has these three dimensions, in this or the attention interface's
    order, and one more, or batch and heads as one.
    """
    if not (read.requires_grad and result.requires_grad and read.is_floating_point()):
        return False
    batch, heads, queries = shape
    chunks = read.reshape(batch, queries, heads, -1)
    random = torch.Generator().manual_seed(0)
    for chosen in sets_of_units(heads):  # equal at every set only where each chunk depends on its own head alone
        if not chosen.any():
            continue
        direction = only(chosen, torch.randn(chunks.shape, generator=random).to(chunks), axis=2)
        (gradient,) = torch.autograd.grad(chunks, result, direction, retain_graph=True, allow_unused=True)
        if gradient is None:
            return False
        if result.ndim == 4 and tuple(result.shape[:3]) != tuple(shape):
            gradient = gradient.transpose(1, 2)
        used = (gradient.reshape(batch, heads, -1) != 0).any(dim=-1).any(dim=0).cpu()
        if not torch.equal(used, chosen):
            return False
    return True
