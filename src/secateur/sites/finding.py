"""Every kind of site of a model: heads, neurons and layers, each found by running it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError, invalid
from secateur.models.base_model import base_of
from secateur.models.fetched import gradients_within, layers_of
from secateur.models.finite import tensors_of
from secateur.models.inputs import example_inputs
from secateur.models.offload import device_of, is_offloaded
from secateur.models.state import evaluation_mode, gradients_for_all, held, in_float32, weights_change, without_autocast
from secateur.sites.attention import find_sites
from secateur.sites.feed_forward import FeedForwardSite, is_projection
from secateur.sites.feed_forward_finder import FeedForwardFinder
from secateur.sites.layers import LayerFinder, LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.sites.narrowing import Undo, narrow_
from secateur.sites.recipe import KINDS, Recipe, read_recipe
from secateur.sites.unit_gates import unit_gates
from secateur.support.interrupts import interruptible, undoing

_SAME = 1e-4  # of outputs in float32, relative to the largest where that is above 1


@interruptible
def find_units(
    model: nn.Module, units: Collection[str] = tuple(KINDS), inputs: Mapping[str, Any] | None = None
) -> dict[str, Site]:
    """Return the sites of these kinds that a forward pass of `model` reaches, heads first, then neurons, then layers.

    Args:
        model: a transformers model with floating-point weights, which is left as it was.
        units: kinds of units: "heads", "neurons", "layers".
        inputs: keyword arguments of the base model's forward; example inputs where absent.

    Raises `InvalidInputError` for another kind, and `UnsupportedModelError` where the model has none of a kind.
    """
    check_units(units)
    found: dict[str, Site] = {}
    if AttentionSite.kind in units:
        found |= find_sites(model, inputs)
    if FeedForwardSite.kind in units:
        found |= find_neurons(model, inputs)[0]
    if LayerSite.kind in units:
        found |= find_layers(model, inputs)
    return found


def units_named(model: nn.Module, names: Iterable[str]) -> dict[str, Site]:
    """Return the sites of the kinds that these names of sites are of."""
    return find_units(model, kinds_named(base_of(model), names))


def kinds_named(base: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return the kinds of units that these names of sites are of: heads where a name is of neither other kind."""
    modules = dict(base.named_modules())
    return {_kind_of(modules.get(name)) for name in names} or {AttentionSite.kind}


def _kind_of(module: nn.Module | None) -> str:
    if isinstance(module, nn.ModuleList):
        return LayerSite.kind
    return FeedForwardSite.kind if module is not None and is_projection(module) else AttentionSite.kind


def check_units(units: Any) -> None:
    """Raise `InvalidInputError` unless these are kinds of units, at least one."""
    if isinstance(units, str) or not isinstance(units, Collection) or not units or not set(units) <= set(KINDS):
        raise invalid("units", f"be some of {', '.join(KINDS)}, such as ('heads', 'neurons')", units)


def find_neurons(
    model: nn.Module, inputs: Mapping[str, Any] | None = None
) -> tuple[dict[str, FeedForwardSite], dict[str, str]]:
    """Return the feed-forward sites of a model, and the reason for each block that is refused, by its name.

    Half of the neurons are cut at one site of every kind, for a moment: where the model does not run then, or does not
    compute what it does with them gated, sites of the kind are refused, or no sites at all where others read their
    neurons too. Where `device_map` keeps weights on CPU or disk, gradients flow within one layer at a time. Raises
    `UnsupportedModelError` for a model in which nothing is left.
    """
    base = base_of(model)
    inputs = example_inputs(base) if inputs is None else inputs
    finder = FeedForwardFinder(base)
    with (
        held(base), in_float32(base), without_autocast(device_of(base)), evaluation_mode(base), gradients_for_all(base),
        torch.random.fork_rng(),
    ):  # fmt: skip
        with finder.watching(), gradients_within(base, layers_of(base)) if is_offloaded(base) else nullcontext():
            outputs = tensors_of(base(**inputs))
        with torch.no_grad():
            found, refused = _without_unfit(base, finder, inputs, outputs)
    found = _numbered(found, read_recipe(base.config))
    if not found:
        reasons = [*(finder.refused | refused).values()]
        why = f": {reasons[0]}" if reasons else ""
        raise UnsupportedModelError(f"{type(base).__name__} has no feed-forward block whose neurons can go{why}")
    return found, finder.refused | refused


def find_layers(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> dict[str, LayerSite]:
    """Return the lists of layers of a model. Raises `UnsupportedModelError` where it has none."""
    base = base_of(model)
    inputs = example_inputs(base) if inputs is None else inputs
    finder = LayerFinder(base)
    with held(base), evaluation_mode(base), torch.no_grad(), torch.random.fork_rng(), finder.watching():
        base(**inputs)
    found = _numbered(finder.sites(), read_recipe(base.config))
    if not found:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no list of layers that each run once and keep the shape of what they are given"
        )
    return found


def _numbered(found: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """Give the units of a model pruned before their original numbers, and add the sites that have none left."""
    sites = dict(found)
    kind = next((site.kind for site in found.values()), FeedForwardSite.kind)
    for name, site in (recipe.sites if recipe is not None else {}).items():
        units = recipe.kept[name] if recipe is not None else ()
        if site.kind != kind or (name not in sites and units):
            continue
        pruned = sites.get(name, replace(site, slices=(), attributes={}))
        if name in sites and pruned.num_units != len(units):
            raise UnsupportedModelError(
                f"site {name}: the config's recipe keeps {len(units)} {kind} but the model has {pruned.num_units}"
            )
        sites[name] = replace(
            pruned, units=units, num_units=len(units), num_groups=len(units),
            original_num_units=site.original_num_units, original_num_groups=site.original_num_groups,
        )  # fmt: skip
    return sites


def _without_unfit(
    base: PreTrainedModel, finder: FeedForwardFinder, inputs: Mapping[str, Any], outputs: Sequence[Tensor]
) -> tuple[dict[str, FeedForwardSite], dict[str, str]]:
    """Try a cut at one site of every layout; return the sites that stand it, and the reason for each of the others.

    Left out of both are those that fail because others read their neurons too: they are no feed-forward blocks.
    `outputs` are those of the pass that `finder` watched.
    """
    verdicts: dict[str, str | None] = {}
    fit, refused = {}, {}
    for name, site in finder.sites().items():
        layout = repr({**site.to_json(), "class": type(base.get_submodule(name.rpartition(".")[0])).__name__})
        if layout not in verdicts:
            reason = _reason_against(base, site, inputs)
            verdicts[layout] = None if reason and finder.others_read(site, outputs) else reason
        verdict = verdicts[layout]
        if verdict:
            refused[name] = f"site {name}: {verdict}"
        elif verdict is not None:
            fit[name] = site
    return fit, refused


def _reason_against(base: PreTrainedModel, site: FeedForwardSite, inputs: Mapping[str, Any]) -> str:
    """Return why the model does not compute with fewer neurons what it does with them gated, or nothing."""
    if _is_adapters(base, site):
        return "it is an adapter's; merge adapters into the weights first"
    kept = torch.arange(site.num_units) % 2 == 0
    if site.num_units < 2:
        return ""
    with unit_gates(base, {site.name: kept.float()}):
        wanted = _outputs(base, inputs)
    try:
        with weights_change(base), _undone() as undo:
            narrow_(base, site, kept, undo)
            found = _outputs(base, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError) as error:
        return f"its code counts on all neurons ({' '.join(str(error).split())[:120]})"
    same = [a.shape == b.shape and _close(a, b) for a, b in zip(wanted, found, strict=False)]
    return "" if len(wanted) == len(found) and all(same) else "without its neurons the model differs from the gated one"


@undoing
def _undone() -> Iterator[Undo]:
    """Yield a list of steps that undo what is done, and take them at the end."""
    undo: Undo = []
    try:
        yield undo
    finally:
        for step in reversed(undo):
            step()


def _is_adapters(base: PreTrainedModel, site: FeedForwardSite) -> bool:
    """Does the block lie beside a weight that PEFT adapts, and keeps as `base_layer`? Its width is a rank then."""
    parts = site.name.split(".")
    holders = [base.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    pairs = zip(holders, parts, strict=True)
    return any("base_layer" in holder._modules and name != "base_layer" for holder, name in pairs)


def _outputs(base: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tensors_of(base(**inputs))


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.numel():
        return True
    return float((one - other).abs().max()) <= _SAME * max(1.0, float(one.abs().max()))
