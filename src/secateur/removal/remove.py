"""Deleting units for real: smaller weights, proved equal to the gated model, or the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import RemovalError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs
from secateur.models.names import forget_names_
from secateur.models.state import held, in_float32, weights_change
from secateur.removal.alignment import renumber_alignment_heads_
from secateur.removal.left import Left
from secateur.removal.plain import say_plainly_
from secateur.removal.proof import FAILURES, TOLERANCE, wanted_of
from secateur.removal.proving import difference_to, prove
from secateur.removal.replay import cut_site_
from secateur.removal.telling import check_record, recipe_of, tell_
from secateur.sites.finding import units_named
from secateur.sites.gating import is_probed, probe
from secateur.sites.layout import Site
from secateur.sites.narrowing import Undo
from secateur.sites.recipe import Recipe
from secateur.support.checks import check_mapping
from secateur.support.interrupts import in_one_go, interruptible, undoing
from secateur.units.masks import Mask, PresentMask, check_mask, units_left


@dataclass(frozen=True)
class Removal:
    """What a removal did: the mask in original numbering, units before and after, and the proof's difference."""

    mask: Mask
    units_before: int
    units_after: int
    max_difference: float


@undoing
def gated(model: nn.Module, mask: Mask, sites: Mapping[str, Site] | None = None) -> Iterator[None]:
    """Within this context the units that `mask` drops write nothing: a preview of the removal that undoes itself.

    They are closed to the passes of this thread alone.

    Where another attention implementation is asked for inside, the gates stay in force, and it is what the model has
    afterwards. With gradient checkpointing `backward()` belongs into the context too: it runs the blocks again, and
    without the gates their gradients are others.

    Raises what `Mask.present` and `find_units` raise. A pass that would leave out a gate raises
    `UnsupportedModelError`.
    """
    base_of(model)
    if sites is not None:
        check_mapping("sites", sites)
    check_mask(mask)
    sites = units_named(model, mask) if sites is None else sites
    gates = {name: kept.to(torch.float32) for name, kept in mask.present(sites).items()}
    with probe(model, gates=gates):
        yield


@interruptible
@torch.inference_mode(False)  # weights that are made in it could not be trained
def remove_(
    model: nn.Module,
    mask: Mask,
    *,
    inputs: Mapping[str, Any] | None = None,
    sites: Mapping[str, Site] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Removal:
    """Delete from `model`, in place, the weights of every head, neuron and layer that `mask` drops.

    The smaller model is compared with the gated one on `inputs` (keyword arguments of the base model's forward; made
    up where absent), in float32, and where the model keeps a cache, also with the first token cached. Where the config
    names lengths such as a sliding window, the same goes for a made-up text past them, up to 1,024 tokens, if the model
    can read it (see `long_example_inputs`). Where they differ by more than 1e-4, or the smaller model does not run,
    everything is put back and `RemovalError` raised. Parameters keep their identity, but an optimiser that already
    holds state for them must be made anew.

    Units go only where the proof looks: `InvalidInputError` names a site that loses units and that `inputs` do not
    reach, `UnsupportedModelError` a parameter of such a site that no pass uses. Where layers go, the sites in the
    layers after them have other names from then on, as their modules have.

    Grouped queries: in each site either whole key-value groups go, or the same number of query heads in every group
    that stays; `InvalidInputError` names a mask that does neither.

    The config says what is left by its own numbers, such as `num_hidden_layers` and `intermediate_size`, where it can;
    then the model loads where secateur is not. Elsewhere it has a recipe, `head_pruning`, to which `record` is added.
    The model has no name (`name_or_path`) afterwards: it is not the one that it was loaded from, which the recipe names
    as its `base_model`. The heads of Whisper's `alignment_heads` are given the numbers that they have then.
    """
    base = base_of(model)
    _check_possible(mask, inputs=inputs, sites=sites, record=record)
    sites = units_named(base, mask) if sites is None else sites
    kept = mask.present(sites)
    for name, vector in kept.items():
        sites[name].check(vector)
    if is_probed(base):
        raise RemovalError("the model is being gated or probed; remove units outside of that context")
    inputs = example_inputs(base) if inputs is None else inputs
    before = base.config.to_dict()
    with held(base), weights_change(base), in_float32(base):
        with gated(base, mask, sites):
            wanted = wanted_of(base, inputs, [sites[name] for name, vector in kept.items() if not vector.all()])
        with _undone_on_failure() as undo:
            left = Left.of(model, sites, kept, undo)
            for name, site in left.sites.items():
                cut_site_(base, site, left.kept[name], undo)
            difference, special = prove(base, wanted, left, undo)
            if not difference <= TOLERANCE:
                raise RemovalError(
                    f"{type(base).__name__} without the units differs from the gated model by {difference:.2g} "
                    f"(at most {TOLERANCE:g} is accepted); the model is unchanged"
                )
            recipe = recipe_of(model, left, special, record or {})
            is_plain = _is_plain(model, recipe, partial(difference_to, wanted, base), undo)
            in_one_go(partial(_end_, model, partial(tell_, model, recipe, is_plain, before), kept, undo))
    counts = units_left(sites, mask).values()
    return Removal(kept.original(sites), sum(n for n, _ in counts), sum(n for _, n in counts), difference)


def _end_(model: PreTrainedModel, tell: Callable[[], None], kept: PresentMask, undo: Undo) -> None:
    """Let a proved model say what it is now; from then on nothing is undone."""
    tell()
    renumber_alignment_heads_(model, kept)
    forget_names_(model)
    for holder in (model, base_of(model)):
        # A static cache that `generate` keeps for its next call was allocated for the heads that were there.
        vars(holder).pop("_cache", None)
    undo.clear()


def _check_possible(mask: Mask, **given: Mapping[str, Any] | None) -> None:
    """Raise for arguments that `remove_` does not take."""
    for argument, value in given.items():
        if value is not None:
            check_mapping(argument, value)
    check_mask(mask)
    check_record(given["record"] or {})


def _is_plain(model: PreTrainedModel, recipe: Recipe, difference: Callable[[], float], undo: Undo) -> bool:
    """Let the config of the cut model say by its own numbers what `recipe` says, if it can and computes the same.

    Also with attention maps, which are computed by other code: it may read a number that the usual code leaves alone.
    """
    start = len(undo)
    try:
        if (
            say_plainly_(model, recipe, undo)
            and difference() <= TOLERANCE
            and _with_maps(model, difference) <= TOLERANCE
        ):
            return True
    except FAILURES:  # of a model that runs with units missing, but not with those numbers
        pass
    for step in reversed(undo[start:]):
        step()
    del undo[start:]
    return False


def _with_maps(model: PreTrainedModel, difference: Callable[[], float]) -> float:
    """Return the difference where maps are computed, 0 for a model that computes none."""
    try:
        with probe(model, weights=True):
            return difference()
    except UnsupportedModelError:
        return 0.0


@undoing
def _undone_on_failure() -> Iterator[list[Callable[[], None]]]:
    """Yield a list of steps that undo what is done, and take them where an exception leaves the block."""
    undo: list[Callable[[], None]] = []
    with ExitStack() as steps:  # it runs them backwards, and goes on where one fails
        try:
            yield undo
        except BaseException:
            for step in undo:
                steps.callback(step)
            raise
