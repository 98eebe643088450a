"""Deleting units for real: smaller weights, proved equal to the gated model, or the model as it was."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import RemovalError, invalid
from secateur.models.base_model import base_of
from secateur.models.failure import place_of, running_modules, site_of
from secateur.models.inputs import example_inputs
from secateur.models.names import forget_names_, original_name
from secateur.models.offload import check_loaded
from secateur.models.state import check_plain_weights, held, in_float32
from secateur.removal.adapted import ConfigView
from secateur.removal.alignment import renumber_alignment_heads_
from secateur.removal.emptied import bypass_
from secateur.removal.proof import FAILURES, TOLERANCE, Wanted, wanted_of
from secateur.removal.replay import cut_site_
from secateur.removal.reshaped import reshape_
from secateur.removal.shortened import shorten_
from secateur.sites.finding import units_named
from secateur.sites.gating import is_probed, probe
from secateur.sites.layers import LayerSite
from secateur.sites.layout import AttentionSite, Site
from secateur.sites.moved import mark_sites_, moved_path, moved_site, present_recipe
from secateur.sites.narrowing import Undo
from secateur.sites.recipe import KEY, OWN_NAMES, REMOVED, Recipe
from secateur.support.checks import check_mapping
from secateur.units.masks import Mask, PresentMask, check_mask


@dataclass(frozen=True)
class Removal:
    """What a removal did: the mask in original numbering, units before and after, and the proof's difference."""

    mask: Mask
    units_before: int
    units_after: int
    max_difference: float


@contextmanager
def gated(model: nn.Module, mask: Mask, sites: Mapping[str, Site] | None = None) -> Iterator[None]:
    """Within this context the units that `mask` drops write nothing: a preview of the removal that undoes itself.

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

    `record` is written to the config's `head_pruning` beside the kept units. The model has no name (`name_or_path`)
    afterwards: it is not the one that it was loaded from, which the recipe names as its `base_model`. The heads of
    Whisper's `alignment_heads` are given the numbers that they have then.
    """
    base = base_of(model)
    for argument, value in (("inputs", inputs), ("sites", sites), ("record", record)):
        if value is not None:
            check_mapping(argument, value)
    check_mask(mask)
    _check_record(record or {})
    check_loaded(base, "removing units")
    check_plain_weights(base)
    sites = units_named(base, mask) if sites is None else sites
    kept = mask.present(sites)
    for name, vector in kept.items():
        sites[name].check(vector)
    if is_probed(base):
        raise RemovalError("the model is being gated or probed; remove units outside of that context")
    inputs = example_inputs(base) if inputs is None else inputs
    with held(base), in_float32(base):
        with gated(base, mask, sites):
            wanted = wanted_of(base, inputs, [sites[name] for name, vector in kept.items() if not vector.all()])
        with _undone_on_failure() as undo:
            left = _Left.of(model, sites, kept, undo)
            for name, site in left.sites.items():
                cut_site_(base, site, left.kept[name], undo)
            difference, special = _prove(base, wanted, left, undo)
            if not difference <= TOLERANCE:
                raise RemovalError(
                    f"{type(base).__name__} without the units differs from the gated model by {difference:.2g} "
                    f"(at most {TOLERANCE:g} is accepted); the model is unchanged"
                )
    _write_recipe(model, left, special, record or {})
    renumber_alignment_heads_(model, kept)
    forget_names_(model)
    for holder in (model, base):
        # A static cache that `generate` keeps for its next call was allocated for the heads that were there.
        vars(holder).pop("_cache", None)
    return Removal(kept.original(sites), kept.num_units, kept.num_kept, difference)


@dataclass(frozen=True)
class _Left:
    """What to cut once layers are gone: `sites` by their names then, and which of their units are `kept`.

    `layers` has the lists that lost some, with the original numbers of those that stay.
    """

    sites: dict[str, Site]
    kept: dict[str, Tensor]
    layers: dict[str, tuple[LayerSite, tuple[int, ...]]]

    @classmethod
    def of(cls, model: PreTrainedModel, sites: Mapping[str, Site], kept: PresentMask, undo: Undo) -> _Left:
        """Take layers out of `model` where the mask drops some, and say what is left to be cut."""
        moved: dict[str, str | None] = {}
        layers: dict[str, tuple[LayerSite, tuple[int, ...]]] = {}
        for name, site in sites.items():
            if isinstance(site, LayerSite) and not kept[name].all():
                moved |= shorten_(model, site, kept[name], undo)
                layers[name] = (site, tuple(itertools.compress(site.units, kept[name].tolist())))
        others = {name: site for name, site in sites.items() if not isinstance(site, LayerSite)}
        names = {name: new for name in others if (new := moved_path(name, moved)) is not None}
        here = {new: moved_site(others[name], moved) for name, new in names.items()}
        return cls(here, {new: kept[name] for name, new in names.items()}, layers)


@contextmanager
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


@dataclass(frozen=True)
class _Special:
    """Sites that do not run as they are once heads are gone, by what is done about it."""

    bypassed: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def _prove(
    base: PreTrainedModel,
    wanted: Sequence[Wanted],
    left: _Left,
    undo: Undo,
) -> tuple[float, _Special]:
    """Return the difference of the cut model to the gated one, and the sites that do not run as they are.

    A model that raises is run again: with the code of emptied sites left out, or with the widths corrected that the
    code of the site which was running asks for.
    """
    sites = {name: site for name, site in left.sites.items() if isinstance(site, AttentionSite)}
    kept = left.kept
    emptied = [site for name, site in sites.items() if not kept[name].any()]
    special = _Special()
    while True:
        try:
            with running_modules(base) as running:
                return max(one.difference(base) for one in wanted), special
        except FAILURES as error:
            site = sites.get(site_of(running, sites) or "")
            can_reshape = site is not None and 0 < int(kept[site.name].sum()) < site.original_num_units
            if site is not None and can_reshape and site.name not in special.reshaped:
                reshape_(base.get_submodule(site.name), site, int(kept[site.name].sum()), undo)
                special.reshaped.append(site.name)
            elif emptied and not special.bypassed:
                for bare in emptied:
                    bypass_(base, bare, undo)
                    special.bypassed.append(bare.name)
            else:
                where = f" at site {site.name}" if site is not None else ""
                place = place_of(error, base.get_submodule(running[-1] if running else ""))
                raise RemovalError(
                    f"{type(base).__name__} does not run with fewer units{where}: its code counts on all of them "
                    f"({place}: {' '.join(str(error).split())[:120]}); leave the site whole, or gate its units "
                    "with `secateur.gated`, which works, as scoring does; the model is unchanged"
                ) from error


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` unless the record is JSON and leaves what a recipe holds alone."""
    if taken := sorted(OWN_NAMES & set(record)):
        raise invalid("record", f"not have the names {', '.join(sorted(OWN_NAMES))}", taken)
    try:
        json.dumps(record)
    except (TypeError, ValueError):
        raise invalid("record", "hold what JSON can hold", dict(record)) from None


def _write_recipe(model: nn.Module, left: _Left, special: _Special, record: Mapping[str, Any]) -> None:
    """Put the recipe into the config of the model, and of its base model where that is another object.

    Sites that an earlier recipe knows and this removal did not see stay in it as they are.
    """
    give_own_configs_(model)
    base = base_of(model)
    earlier = present_recipe(base) or Recipe({}, {})
    origin = original_name(model)
    record = {**({"base_model": origin} if origin else {}), **earlier.record, **record}
    recipe = _recipe(earlier, left, special, record)
    for config in (model.config, base.config):
        setattr(config, KEY, recipe.to_json())
    setattr(base, REMOVED, True)
    mark_sites_(base, recipe)


def _recipe(earlier: Recipe, left: _Left, special: _Special, record: Mapping[str, Any]) -> Recipe:
    """Return the recipe of all removals so far; `earlier` has the names already that sites have now."""
    kept_units = {
        name: tuple(itertools.compress(site.units, left.kept[name].tolist())) for name, site in left.sites.items()
    }
    # What an earlier recipe says of a site is of the unpruned model; a site that none names is unpruned now.
    now = left.sites | {name: site for name, (site, _) in left.layers.items()}
    sites = earlier.sites | {name: site for name, site in now.items() if name not in earlier.sites}
    kept_units = earlier.kept | kept_units | {name: units for name, (_, units) in left.layers.items()}
    there = {
        name: site
        for name, site in sites.items()
        if isinstance(site, AttentionSite) or len(kept_units[name]) < site.original_num_units
    }
    heads = [site for site in there.values() if isinstance(site, AttentionSite)]
    of_heads = {}
    if heads:
        ratio = 1 - sum(len(kept_units[s.name]) for s in heads) / sum(s.original_num_units for s in heads)
        of_heads["pruning_ratio"] = round(ratio, 6)
    return Recipe(
        {name: kept_units[name] for name in there},
        there,
        bypassed=tuple(dict.fromkeys([*earlier.bypassed, *special.bypassed])),
        reshaped=tuple(dict.fromkeys([*earlier.reshaped, *special.reshaped])),
        record={**record, **of_heads},
    )


def give_own_configs_(model: nn.Module) -> None:
    """Replace the configs that the modules hold by copies: another model built from the same object stays unpruned."""
    copies: dict[int, Any] = {}
    originals = []  # kept alive meanwhile, since the copies are looked up by id
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            originals.append(config)
            module.config = copies[id(config)] if id(config) in copies else copy.deepcopy(config, copies)
    for module in model.modules():
        view = getattr(module, "config", None)
        if isinstance(view, ConfigView):
            view.of = copies.get(id(view.of), view.of)
