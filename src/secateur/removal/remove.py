"""Deleting heads for real: smaller weights, proved equal to the gated model, or the model as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import RemovalError, invalid
from secateur.models.base_model import base_of
from secateur.models.failure import place_of, running_modules, site_of
from secateur.models.inputs import example_inputs
from secateur.models.names import forget_names_, original_name
from secateur.models.offload import check_loaded
from secateur.models.state import held, in_float32
from secateur.removal.adapted import ConfigView
from secateur.removal.alignment import renumber_alignment_heads_
from secateur.removal.emptied import bypass_
from secateur.removal.proof import FAILURES, TOLERANCE, Wanted, wanted_of
from secateur.removal.replay import cut_site_
from secateur.removal.reshaped import reshape_
from secateur.sites.attention import find_sites
from secateur.sites.gating import is_probed, probe
from secateur.sites.layout import Site
from secateur.sites.moved import mark_sites_, present_recipe
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
    """Within this context the heads that `mask` drops write nothing: a preview of the removal that undoes itself.

    Where another attention implementation is asked for inside, the gates stay in force, and it is what the model has
    afterwards. With gradient checkpointing `backward()` belongs into the context too: it runs the blocks again, and
    without the gates their gradients are others.

    Raises what `Mask.present` and `find_sites` raise. A pass that would leave out a gate raises
    `UnsupportedModelError`.
    """
    base_of(model)
    if sites is not None:
        check_mapping("sites", sites)
    check_mask(mask)
    sites = find_sites(model) if sites is None else sites
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
    """Delete from `model`, in place, the weights of every head that `mask` drops.

    The smaller model is compared with the gated one on `inputs` (keyword arguments of the base model's forward; made
    up where absent), in float32, and where the model keeps a cache, also with the first token cached. Where the config
    names lengths such as a sliding window, the same goes for a made-up text past them, up to 1,024 tokens, if the model
    can read it (see `long_example_inputs`). Where they differ by more than 1e-4, or the smaller model does not run,
    everything is put back and `RemovalError` raised. Parameters keep their identity, but an optimiser that already
    holds state for them must be made anew.

    Heads go only where the proof looks: `InvalidInputError` names a site that loses heads and that `inputs` do not
    reach, `UnsupportedModelError` a parameter of such a site that no pass uses.

    Grouped queries: in each site either whole key-value groups go, or the same number of query heads in every group
    that stays; `InvalidInputError` names a mask that does neither.

    `record` is written to the config's `head_pruning` beside the kept heads. The model has no name (`name_or_path`)
    afterwards: it is not the one that it was loaded from, which the recipe names as its `base_model`. The heads of
    Whisper's `alignment_heads` are given the numbers that they have then.
    """
    base = base_of(model)
    for argument, value in (("inputs", inputs), ("sites", sites), ("record", record)):
        if value is not None:
            check_mapping(argument, value)
    check_mask(mask)
    _check_record(record or {})
    check_loaded(base, "removing heads")
    sites = find_sites(base) if sites is None else sites
    kept = mask.present(sites)
    for name, vector in kept.items():
        sites[name].check(vector)
    if is_probed(base):
        raise RemovalError("the model is being gated or probed; remove heads outside of that context")
    inputs = example_inputs(base) if inputs is None else inputs
    with held(base), in_float32(base):
        with gated(base, mask, sites):
            wanted = wanted_of(base, inputs, [sites[name] for name, vector in kept.items() if not vector.all()])
        with _undone_on_failure() as undo:
            for name, site in sites.items():
                cut_site_(base, site, kept[name], undo)
            difference, special = _prove(base, wanted, sites, kept, undo)
            if not difference <= TOLERANCE:
                raise RemovalError(
                    f"{type(base).__name__} without the heads differs from the gated model by {difference:.2g} "
                    f"(at most {TOLERANCE:g} is accepted); the model is unchanged"
                )
    _write_recipe(model, sites, kept, special, record or {})
    renumber_alignment_heads_(model, kept)
    forget_names_(model)
    for holder in (model, base):
        # A static cache that `generate` keeps for its next call was allocated for the heads that were there.
        vars(holder).pop("_cache", None)
    return Removal(kept.original(sites), kept.num_units, kept.num_kept, difference)


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
    sites: Mapping[str, Site],
    kept: PresentMask,
    undo: list[Callable[[], None]],
) -> tuple[float, _Special]:
    """Return the difference of the cut model to the gated one, and the sites that do not run as they are.

    A model that raises is run again: with the code of emptied sites left out, or with the widths corrected that the
    code of the site which was running asks for.
    """
    emptied = [sites[name] for name, vector in kept.items() if not vector.any()]
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
                    f"{type(base).__name__} does not run with fewer heads{where}: its code counts on all of them "
                    f"({place}: {' '.join(str(error).split())[:120]}); leave the site whole, or gate its heads "
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


def _write_recipe(
    model: nn.Module,
    sites: Mapping[str, Site],
    kept: PresentMask,
    special: _Special,
    record: Mapping[str, Any],
) -> None:
    """Put the recipe into the config of the model, and of its base model where that is another object.

    Sites that an earlier recipe knows and this removal did not see stay in it as they are.
    """
    give_own_configs_(model)
    base = base_of(model)
    earlier = present_recipe(base) or Recipe({}, {})
    kept_units = {name: tuple(units) for name, units in kept.original(sites).kept.items()}
    kept_units |= {name: units for name, units in earlier.kept.items() if name not in kept_units}
    # What an earlier recipe says of a site is of the unpruned model; a site that none names is unpruned now.
    originals = earlier.sites | {name: site for name, site in sites.items() if name not in earlier.sites}
    origin = original_name(model)
    record = {**({"base_model": origin} if origin else {}), **earlier.record, **record}
    ratio = 1 - sum(map(len, kept_units.values())) / sum(site.original_num_units for site in originals.values())
    recipe = Recipe(
        kept_units,
        originals,
        bypassed=tuple(dict.fromkeys([*earlier.bypassed, *special.bypassed])),
        reshaped=tuple(dict.fromkeys([*earlier.reshaped, *special.reshaped])),
        record={**record, "pruning_ratio": round(ratio, 6)},
    )
    for config in (model.config, base.config):
        setattr(config, KEY, recipe.to_json())
    setattr(base, REMOVED, True)
    mark_sites_(base, recipe)


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
