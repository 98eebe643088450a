"""Reading and gating attention heads while a model runs.

transformers looks the attention function up by name in each module's config. Here two functions are registered under
names of our own: both call what the model itself would call (its eager function, or its SDPA one), hand the result to
a callback and multiply every head by its gate. `probe` puts that name in the model's configs and takes it out again.

The mask builder is looked up by the same name, and a name without one silently means "no mask at all": so each of the
two registers the matching builder too.

Attention that does not go through the interface is reached by hooks instead: see direct.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.offload import is_offloaded
from secateur.models.state import held, without_autocast
from secateur.sites.direct import Computed, inside_interface, is_known, known_sites, look_for_sites, watch
from secateur.sites.unit_gates import takes_plain_gates, unit_gates

_PREFIX = "secateur_"


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


_active: list[_Probe] = []  # outermost first


@contextmanager
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


@contextmanager
def _probing(
    base: PreTrainedModel, callback: Callable[[HeadReading], None] | None, gates: Mapping[str, Tensor], weights: bool
) -> Iterator[None]:
    entry = _Probe(base, {id(m): n for n, m in base.named_modules()}, callback, gates, weights)
    if not is_known(base):
        prepare(base)
    direct = known_sites(base)
    if direct is None:
        unknown = [site for site in entry.gates if not _goes_through_interface(base.get_submodule(site))]
        if unknown:
            raise UnsupportedModelError(f"site {unknown[0]} has not been looked for; call `find_sites` with `inputs`")
    mine = [p for p in _active if p.model is base]
    _active.append(entry)
    try:
        with (
            _own_names(base, weights or any(p.weights for p in mine)),
            watch(base, direct or {}, partial(_pass_direct, entry)),
        ):
            yield
    finally:
        others = [p for p in _active if p.model is base]
        _active.remove(entry)
        if len(others) == 1:
            for config in _configs(base):  # of ours where an outer context ended before this one
                config._attn_implementation_internal = _plain(config._attn_implementation_internal)
        if others[-1] is not entry:
            raise SecateurError("gates and probes of one model must end in reverse order: one that began later is left")


def prepare(base: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> None:
    """Look for attention outside the interface, with `inputs` where the model does not run on example ones.

    Not where weights are fetched layer by layer: gradients through the whole model would hold all of them.
    """
    if is_offloaded(base):
        return
    with held(base), without_autocast(base.device), _own_names(base, maps=True):
        look_for_sites(base, inputs)


@contextmanager
def _own_names(base: PreTrainedModel, maps: bool) -> Iterator[None]:
    """Put our attention functions into the configs that modules of the model consult."""
    saved = [(config, config._attn_implementation_internal) for config in _configs(base)]
    reaches = {
        id(module.config) for module in base.modules() if hasattr(module, "config") and _goes_through_interface(module)
    }
    try:
        for config, implementation in saved:
            kind = _kind(base, implementation, maps)
            # Code that does not use the interface compares the name, and must find one that it knows.
            config._attn_implementation_internal = _PREFIX + kind if id(config) in reaches else kind
        yield
    finally:
        for config, implementation in saved:
            config._attn_implementation_internal = implementation


def _configs(base: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return each distinct config that a module of the model consults."""
    found = {}
    for module in base.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


def _kind(base: PreTrainedModel, implementation: str | None, need_maps: bool) -> str:
    original = _plain(implementation) or "eager"
    return "eager" if need_maps or original == "eager" or not base._supports_sdpa else "sdpa"


def _plain(implementation: str | None) -> str | None:
    return None if implementation is None else implementation.removeprefix(_PREFIX)


def _goes_through_interface(module: nn.Module) -> bool:
    files = {parent.__module__ for parent in type(module).__mro__} - {PreTrainedModel.__module__}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


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
        if site is None:
            continue
        if outputs.ndim != 4 or outputs.shape[2] != query.shape[1]:
            raise UnsupportedModelError(f"site {site}: its attention function does not keep the heads apart")
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
    AttentionInterface.register(_PREFIX + _name, partial(_attend, _name))
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


@torch.no_grad()
def count_heads(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Run `model` once and return, for each site it reached, its numbers of heads and of key-value heads."""
    found: dict[str, tuple[int, int]] = {}

    def see(reading: HeadReading) -> None:
        heads = reading.outputs.shape[2]
        found[reading.site] = (heads, heads if reading.key is None else reading.key.shape[1])

    with probe(model, see):
        base_of(model)(**inputs)
    return found
