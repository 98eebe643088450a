"""Reading and gating attention heads while a model runs.

transformers looks the attention function up by name in each module's config. Here two functions are registered under
names of our own: both call what the model itself would call (its eager function, or its SDPA one), hand the result to
a callback and multiply every head by its gate. `probe` has the model look these names up: see implementation.py.

The mask builder is looked up by the same name, and a name without one silently means "no mask at all": so each of the
two registers the matching builder too.

Attention that does not go through the interface is reached by hooks instead: see direct.py.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.offload import is_offloaded
from secateur.models.state import evaluation_mode, held, without_autocast
from secateur.sites.direct import Computed, DirectSite, inside_interface, is_known, known_sites, look_for_sites, watch
from secateur.sites.implementation import PREFIX, goes_through_interface, own_names
from secateur.sites.unit_gates import takes_plain_gates, unit_gates
from secateur.support.interrupts import interruptible, undoing
from secateur.support.threads import in_own_thread, is_own


@dataclass(frozen=True, eq=False)
class HeadReading:
    """What one attention site computed for one batch.

    Shapes: `query` [batch, heads, queries, width], `key` and `value` [batch, key-value heads, keys, width], `weights`
    (the attention map, rows sum to 1) [batch, heads, queries, keys] or None where no maps were asked for, `outputs`
    [batch, queries, heads, width]: the weighted values of each head, before the output projection. `query`, `key` and
    `value` are None at sites outside transformers' attention interface.
    """

    site: str
    module: nn.Module
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    weights: Tensor | None
    outputs: Tensor
    scores: Tensor | None = None
    extras: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class _Probe:
    model: PreTrainedModel
    names: dict[int, str]  # id of a module → its path in the base model; `model` keeps the modules alive
    callback: Callable[[HeadReading], None] | None
    gates: Mapping[str, Tensor]
    weights: bool
    thread: int = field(default_factory=threading.get_ident)  # whose passes it is for
    reached: set[str] = field(default_factory=set)  # sites that attended through the interface since it was looked at


_active: list[_Probe] = []  # outermost first


@undoing
def probe(
    model: nn.Module,
    callback: Callable[[HeadReading], None] | None = None,
    *,
    gates: Mapping[str, Tensor] | None = None,
    weights: bool = False,
) -> Iterator[None]:
    """Within this context every forward pass of `model` streams its heads to `callback` and applies `gates`.

    Args:
        model: any transformers model.
        callback: called once for each attention site and forward pass, as soon as the site has run.
        gates: site name → factors for the units that are there now, `[units]`, or `[batch, units]` for a gate of its
            own for each text; differentiable. Sites without an entry are left alone. Neurons and layers are gated by
            plain hooks (see `unit_gates`).
        weights: whether the callback needs attention maps. They are computed one site at a time and never kept here;
            without them PyTorch's fused attention runs where the model supports it.

    Contexts nest: outer gates apply before inner ones. Raises `UnsupportedModelError` where the model has no attention
    that can be reached, and `SecateurError` where another thread is probing the same model, or one that shares its
    config, and where contexts of one model do not end in reverse order.
    """
    base, gates = base_of(model), gates or {}
    plain = {name: gate for name, gate in gates.items() if takes_plain_gates(base.get_submodule(name))}
    of_heads = {name: gate for name, gate in gates.items() if name not in plain}
    with held(base), _probing(base, callback, of_heads, weights), unit_gates(base, plain):
        yield


def is_probed(base: PreTrainedModel) -> bool:
    """Is this within a `probe` of the model?"""
    return any(entry.model is base for entry in _active)


@undoing
def _probing(
    base: PreTrainedModel, callback: Callable[[HeadReading], None] | None, gates: Mapping[str, Tensor], weights: bool
) -> Iterator[None]:
    entry = _Probe(base, {id(m): n for n, m in base.named_modules()}, callback, gates, weights)
    if not is_known(base):
        prepare(base)
    direct = known_sites(base)
    if direct is None:
        unknown = [site for site in entry.gates if not goes_through_interface(base.get_submodule(site))]
        if unknown:
            raise UnsupportedModelError(f"site {unknown[0]} has not been looked for; call `find_sites` with `inputs`")
    _active.append(entry)
    try:
        with (
            own_names(base, weights),
            watch(base, direct or {}, partial(_pass_direct, entry), entry.reached),
            _none_passed_over(entry, direct or {}),
        ):
            yield
    finally:
        innermost = [p for p in _active if p.model is base][-1]
        _active.remove(entry)
        if innermost is not entry:
            raise SecateurError("gates and probes of one model must end in reverse order: one that began later is left")


@undoing
def _none_passed_over(entry: _Probe, direct: Mapping[str, DirectSite]) -> Iterator[None]:
    """Raise where a module has run whose gate the interface did not apply. Other hooks see to the `direct` sites."""

    def check(site: str, *_: Any) -> None:
        if site not in entry.reached:
            raise UnsupportedModelError(
                f"site {site} did not attend through transformers' attention interface, where its heads were found, so "
                "that its gate would be passed over"
            )
        entry.reached.discard(site)

    with ExitStack() as hooks:
        for site, gate in entry.gates.items():
            if site not in direct and gate.numel():
                module = entry.model.get_submodule(site)
                hooks.callback(module.register_forward_hook(in_own_thread(partial(check, site))).remove)
        yield


def prepare(base: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
    """Look for attention outside the interface, with `inputs` where the model does not run on example ones.

    Not where weights are fetched layer by layer: gradients through the whole model would hold all of them.
    """
    if is_offloaded(base):
        return
    with held(base), without_autocast(base.device), own_names(base, maps=True):
        look_for_sites(base, inputs)


@cache
def _own_function(kind: str, module_class: Any) -> Callable[..., Any]:
    """Return the function that the modelling file of `module_class` would have called itself."""
    for parent in module_class.__mro__:
        file = sys.modules.get(parent.__module__)
        eager = getattr(file, "eager_attention_forward", None)
        interface = getattr(file, "ALL_ATTENTION_FUNCTIONS", None)
        if eager is not None or interface is not None:
            function = (interface if interface is not None else ALL_ATTENTION_FUNCTIONS).get(kind, eager)
            if function is not None:
                return function
    raise UnsupportedModelError(f"{module_class.__name__} has no {kind} attention function that could be called")


def _class_of(module: nn.Module) -> Any:
    return type(module)  # typed loosely: to a type checker, classes of modules do not hash


def _attend(
    kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    outer = getattr(inside_interface, "active", False)
    inside_interface.active = True
    try:
        outputs, weights = _own_function(kind, _class_of(module))(module, query, key, value, *args, **kwargs)
    finally:
        inside_interface.active = outer
    for entry in _active.copy():
        site = entry.names.get(id(module))
        if site is None or not is_own(entry.thread):
            continue
        if outputs.ndim != 4 or outputs.shape[2] != query.shape[1]:
            raise UnsupportedModelError(f"site {site}: its attention function does not keep the heads apart")
        entry.reached.add(site)
        outputs = _pass(
            entry, HeadReading(site, module, query, key, value, weights, outputs, extras=_learned(args, kwargs))
        )
    return outputs, weights


def _learned(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad and x.ndim in (1, 4))


def _pass_direct(entry: _Probe, site: str, module: nn.Module, outputs: Tensor, computed: Computed) -> Tensor:
    if computed.is_map:
        reading = HeadReading(site, module, None, None, None, computed.result, outputs, computed.operands[0])
    else:
        query, key, value = computed.operands
        reading = HeadReading(site, module, query, key, value, None, outputs)
    return _pass(entry, reading)


def _pass(entry: _Probe, reading: HeadReading) -> Tensor:
    """Show one site to the callback and return its outputs gated."""
    outputs = reading.outputs
    if entry.callback is not None:
        if entry.weights and reading.weights is None:
            raise UnsupportedModelError(
                f"site {reading.site} does not compute attention maps; use a scorer that needs none, such as "
                "contribution"
            )
        with without_autocast(outputs.device):
            entry.callback(reading if entry.weights else replace(reading, weights=None))
    gate = entry.gates.get(reading.site)
    if gate is None:
        return outputs
    gate = gate.to(outputs)
    if gate.ndim == 2 and gate.shape[0] != outputs.shape[0]:
        raise UnsupportedModelError(
            f"site {reading.site} attends within {outputs.shape[0]} windows, so {gate.shape[0]} gates, one for each "
            "input, do not fit"
        )
    return outputs * (gate[:, None, :, None] if gate.ndim == 2 else gate[:, None])


for _name in ("eager", "sdpa"):
    AttentionInterface.register(PREFIX + _name, partial(_attend, _name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


@interruptible
@torch.no_grad()
def count_heads(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Run `model` once and return, for each site it reached, its numbers of heads and of key-value heads."""
    found: dict[str, tuple[int, int]] = {}

    def see(reading: HeadReading) -> None:
        heads = reading.outputs.shape[2]
        found[reading.site] = (heads, heads if reading.key is None else reading.key.shape[1])

    base = base_of(model)
    with evaluation_mode(base), probe(base, see):
        base(**inputs)
    return found
