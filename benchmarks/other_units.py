"""Neurons and layers of a tiny model in the sweep: removed, and read back bit for bit, with secateur and without it.

Checked by plain means: channels set to zero by a hook of its own, a layer's forward replaced by one that returns what
it is given.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from benchmarks.outputs import difference, said
from benchmarks.ready_inputs import ready_inputs
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from secateur.errors import SecateurError
from secateur.models.base_model import base_of
from secateur.removal.checkpoint import without_hook
from secateur.removal.remove import remove_
from secateur.sites.feed_forward import FeedForwardSite
from secateur.sites.finding import find_layers, find_neurons
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.units.masks import Mask

TOLERANCE = 1e-4


def check_neurons(model: PreTrainedModel, build_fails: str) -> dict[str, Any]:
    """Remove half of the neurons of every site that has any; say how far that came, and what was refused."""
    result: dict[str, Any] = {"outcome": "refused"}
    try:
        inputs = ready_inputs(model)
        found, refused = find_neurons(model, inputs)
    except SecateurError as error:
        return result | {"reason": str(error)[:300]}
    result |= {"sites": len(found), "refused": refused, "share": _share(model, found, refused)}
    kept = {name: torch.arange(site.num_units) % 2 == 0 for name, site in found.items() if site.num_units > 1}
    if not kept:
        return result | {"reason": "no block has two neurons"}
    fresh = ready_inputs(model, batch=3, length=10, padding=2, seed=1)
    with _silenced(model, kept):
        wanted = said(model, fresh)
    removed = _removed(model, Mask(kept), found, inputs)
    return result | (removed or _compared_and_read(model, fresh, wanted, build_fails))


def check_layers(model: PreTrainedModel, build_fails: str) -> dict[str, Any]:
    """Remove a layer of every list that can lose one, each from a copy; say which can, and how far that came."""
    try:
        lists = {name: site for name, site in find_layers(model, ready_inputs(model)).items() if site.num_units > 1}
    except SecateurError as error:
        return {"outcome": "refused", "reason": str(error)[:300]}
    tried = {name: _without_one(model, site, build_fails) for name, site in lists.items()}
    order = ("reloaded", "removed", "refused", "WRONG")
    outcomes = [one["outcome"] for one in tried.values()]
    best = "WRONG" if "WRONG" in outcomes else next((o for o in order if o in outcomes), "refused")
    plain = [name for name, one in tried.items() if one.get("plain")]
    return {"outcome": best, "lists": tried, "plain": len(plain)}


def _without_one(model: PreTrainedModel, site: LayerSite, build_fails: str) -> dict[str, Any]:
    """Remove the last layer of a list that can go, tried from the end."""
    reasons = []
    for number in reversed(range(site.num_units)):
        kept = torch.ones(site.num_units, dtype=torch.bool)
        kept[number] = False
        smaller = copy.deepcopy(model)
        fresh = ready_inputs(smaller, batch=3, length=10, padding=2, seed=1)
        with _bypassed(base_of(smaller).get_submodule(f"{site.name}.{number}")):
            wanted = said(smaller, fresh)
        refused = _removed(smaller, Mask({site.name: kept}), {site.name: site}, ready_inputs(smaller))
        if not refused:
            return {"layer": number, **_compared_and_read(smaller, fresh, wanted, build_fails)}
        reasons.append(refused["reason"])
    return {"outcome": "refused", "reason": reasons[0]}


def _removed(
    model: PreTrainedModel, mask: Mask, sites: Mapping[str, Site], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Remove what `mask` drops; return the outcome where that is refused, and nothing elsewhere."""
    try:
        remove_(model, mask, inputs=inputs, sites=sites)
    except SecateurError as error:
        return {"outcome": "refused", "reason": str(error)[:300]}
    return {}


def _compared_and_read(
    model: PreTrainedModel, fresh: Mapping[str, Any], wanted: list[Tensor], build_fails: str
) -> dict[str, Any]:
    removed = said(model, fresh)
    apart = difference(wanted, removed)
    if apart > TOLERANCE:
        return {"outcome": "WRONG", "reason": f"removed and gated differ by {apart:.2g} on fresh inputs"}
    if build_fails:
        return {"outcome": "removed", "reason": build_fails}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            again = AutoModel.from_pretrained(folder).eval()
        except Exception as error:
            return {"outcome": "removed", "reason": f"cannot be saved and loaded: {str(error)[:200]}"}
        if moved := _unequal(model, again, fresh, removed):
            return {"outcome": "WRONG", "reason": moved}
        try:
            with without_hook():
                bare = AutoModel.from_pretrained(folder).eval()
            plain = not _unequal(model, bare, fresh, removed)
        except Exception:  # whatever a class raises over weights of other shapes
            plain = False
    return {"outcome": "reloaded", "plain": plain}


def _unequal(model: PreTrainedModel, again: PreTrainedModel, fresh: Mapping[str, Any], removed: list[Tensor]) -> str:
    """Return what came back different, or nothing."""
    ours, theirs = model.state_dict(), again.state_dict()
    if ours.keys() != theirs.keys():
        return "other tensors came back"
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name]):
            return f"{name} came back different"
    for parameter in again.parameters():
        # What is read lies in the file as it comes; memory that starts elsewhere can change a product's last bit.
        parameter.data = parameter.data.clone()
    apart = difference(removed, said(again, fresh))
    return f"the outputs differ by {apart:.2g}" if apart > 0 else ""


def _share(model: PreTrainedModel, found: Mapping[str, FeedForwardSite], refused: Mapping[str, str]) -> float:
    """Return the share of the feed-forward parameters that lie in sites; the rest are those of refused projections."""
    base = base_of(model)
    names = {piece.parameter for site in found.values() for piece in site.slices}
    inside = sum(base.get_parameter(name).numel() for name in names)
    outside = sum(base.get_submodule(name).weight.numel() for name in refused)
    return inside / (inside + outside) if inside else 0.0


@contextlib.contextmanager
def _silenced(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Set what the projections read of the other channels to zero."""

    def hook(row: Tensor) -> Any:
        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            taken = (args[0] if args else next(iter(kwargs.values()))).clone()
            last = isinstance(module, nn.Linear | Conv1D)
            taken.movedim(-1 if last else 1, 0)[~row] = 0
            return (taken, *args[1:]), (kwargs if args else {})

        return change

    with contextlib.ExitStack() as hooks:
        for name, row in kept.items():
            module = base_of(model).get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(hook(row), with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def _bypassed(layer: nn.Module) -> Iterator[None]:
    """Let a layer return the stream that it was given in the place of its own."""

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taken = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        return (taken, *output[1:]) if isinstance(output, tuple | list) else taken

    handle = layer.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
