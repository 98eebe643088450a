"""What is left of every tensor of the original, against what a pruned model has there: no tensor is passed over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.models.base_model import base_of
from secateur.models.loading import lacking
from secateur.sites.layout import NOBODY, Site
from secateur.sites.narrowing import cut_together
from secateur.units.masks import PresentMask, indices_of

EQUAL, REFITTED, TRAINED_SINCE, NEW = "equal", "refitted", "trained", "not in the original"
NOT_FINITE, MISSING, OTHER = "not finite", "missing", "other"
DAMAGE = (NOT_FINITE, MISSING, OTHER)
"""States of a tensor that nothing in the recipe explains."""


@dataclass(frozen=True)
class TensorCheck:
    """What a tensor of a pruned model is, held against the kept part of the original's.

    `state` is "equal", "refitted" (of an output projection of which the recipe says so, or of its bias), "trained",
    "not in the original", "not finite", "missing" (the file of the pruned model lacks it) or "other". `change` is the
    norm of the difference divided by that of the original's kept part, where both have one shape.
    """

    name: str
    state: str
    change: float | None = None


@dataclass(frozen=True)
class Explained:
    """What the recipe says of weights: output projections were `refitted`, or all were `trained` after the removal."""

    refitted: bool
    trained: bool


@torch.no_grad()
def compare_weights(
    pruned: PreTrainedModel,
    original: PreTrainedModel,
    sites: Mapping[str, Site],
    kept: PresentMask,
    explained: Explained,
) -> list[TensorCheck]:
    """Return what each tensor of `pruned` is, in the dtype that it has there; both models stay as they are.

    `original` has all its units but the layers that went: `sites` are its own, of which `kept` says what stays. Models
    of two classes are compared by the base models inside them, beside which the pruned one's tensors are "not in the
    original". A tensor that neither file has is random in both models, and left out.
    """
    cuts = _cuts(original, sites, kept)
    refitted = {id(parameter) for parameter in _refitted(original, sites, kept)} if explained.refitted else set()
    before, _ = _by_names_of(pruned, original)
    there, lost = _tensors(pruned), lacking(pruned)
    checks = [TensorCheck(name, MISSING) for name in before if name not in there or name in lost]
    for name, tensor in there.items():
        if name in lost:
            continue
        if name not in before:
            checks.append(TensorCheck(name, NEW if _is_finite(tensor) else NOT_FINITE))
            continue
        rows = before[name].detach()
        for axis, indices in cuts.get(id(before[name]), ()):
            rows = rows.index_select(axis, indices.to(rows.device))
        checks.append(_compare(name, tensor.detach(), rows, id(before[name]) in refitted, explained.trained))
    return checks


@torch.no_grad()
def round_as_saved_(original: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Round the original's weights to the dtypes of the pruned model's, and take from there what its files lacked.

    Then its outputs differ by what else was changed alone.
    """
    saved = _tensors(pruned)
    before, at_random = _by_names_of(pruned, original)
    for name, tensor in (before | at_random).items():
        other = saved.get(name)
        if other is None or not tensor.is_floating_point():
            continue
        if name in at_random and other.shape == tensor.shape:
            tensor.copy_(other)
        tensor.copy_(tensor.to(other.dtype))


def _by_names_of(pruned: PreTrainedModel, original: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the original's tensors by the names that they have in `pruned`: those its files have, and random ones."""
    files_lack = lacking(original)
    ours, theirs = ("", "") if type(original) is type(pruned) else (_prefix(pruned), _prefix(original))
    there: dict[str, Tensor] = {}
    at_random: dict[str, Tensor] = {}
    for name, tensor in _tensors(original).items():
        if name.startswith(theirs):
            (at_random if name in files_lack else there)[ours + name.removeprefix(theirs)] = tensor
    return there, at_random


def _prefix(model: PreTrainedModel) -> str:
    """Return what names of the base model's tensors begin with in a task model."""
    base = base_of(model)
    path = next(name for name, module in model.named_modules() if module is base)
    return f"{path}." if path else ""


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters, themselves, and buffers, by every name that they have."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _cuts(
    original: PreTrainedModel, sites: Mapping[str, Site], kept: PresentMask
) -> dict[int, list[tuple[int, Tensor]]]:
    """Return for each tensor that loses indices, by its `id`, the axes and the indices that stay.

    A removal cuts a tensor once for each site that has it, so two of one tensor follow one another.
    """
    base = base_of(original)
    cuts: dict[int, list[tuple[int, Tensor]]] = {}
    for name, vector in kept.items():
        if not vector.all():
            for (parameter, axis), indices in sites[name].kept_indices(vector).items():
                for tensor in cut_together(base, parameter).values():
                    cuts.setdefault(id(tensor), []).append((axis, indices))
    return cuts


def _refitted(original: PreTrainedModel, sites: Mapping[str, Site], kept: PresentMask) -> Iterator[Tensor]:
    """Yield the weights and biases that a reconstruction changes: what sites that lose units write with."""
    base = base_of(original)
    for name in losing(sites, kept):
        for piece in sites[name].slices_of("output"):
            if (parameter := base.get_parameter(piece.parameter)).ndim > 1:
                yield parameter
        if (bias := getattr(base.get_submodule(sites[name].output), "bias", None)) is not None:
            yield bias


def losing(sites: Mapping[str, Site], kept: PresentMask) -> list[str]:
    """Return the sites that lose units, or have lost some before."""
    return [
        name
        for name, vector in kept.items()
        if not vector.all() or len(sites[name].units) < sites[name].original_num_units
    ]


@torch.no_grad()
def take_output_projections_(
    original: PreTrainedModel, pruned: PreTrainedModel, sites: Mapping[str, Site], kept: PresentMask
) -> None:
    """Copy what the kept units write with from the pruned model to the original; other weights stay.

    What does not fit, as in a model that is not the original, stays too: then the comparison tells.
    """
    base, sources = base_of(original), base_of(pruned).state_dict()
    for site in (sites[name] for name in losing(sites, kept)):
        stays = {NOBODY, *indices_of(kept[site.name])}
        for piece in site.slices_of("output"):
            there = torch.tensor([owner in stays for owner in piece.owners])
            rows = base.get_parameter(piece.parameter).movedim(piece.axis, 0)
            source = sources.get(piece.parameter)
            if source is not None and source.movedim(piece.axis, 0).shape == rows[there].shape:
                rows[there] = source.movedim(piece.axis, 0).to(rows)
        bias, source = getattr(base.get_submodule(site.output), "bias", None), sources.get(f"{site.output}.bias")
        if bias is not None and source is not None and bias.shape == source.shape:
            bias.copy_(source)


def _compare(name: str, tensor: Tensor, rows: Tensor, is_refitted: bool, is_trained: bool) -> TensorCheck:
    """Return what a tensor is, given the original's rows that stay."""
    if tensor.shape != rows.shape:
        return TensorCheck(name, OTHER)
    rows = rows.to(tensor)
    if bool(((tensor == rows) | (tensor.isnan() & rows.isnan())).all()):
        return TensorCheck(name, EQUAL)
    if not _is_finite(tensor):
        return TensorCheck(name, NOT_FINITE)
    size, difference = (float(x.double().norm()) for x in (rows, tensor.double() - rows.double()))
    state = REFITTED if is_refitted else TRAINED_SINCE if is_trained else OTHER
    change = difference / size if size else math.inf
    return TensorCheck(name, state, change if math.isfinite(change) else None)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
