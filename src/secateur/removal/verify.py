"""Checking a saved model again: every weight on disk, and what they compute, against the gated original."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from secateur.errors import InvalidInputError, shown
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs
from secateur.models.loading import config_class, load_model
from secateur.models.originals import on_this_machine
from secateur.models.sentence_transformers import transformer_folder
from secateur.removal.digest import changed_tensors
from secateur.removal.kept_weights import (
    DAMAGE,
    EQUAL,
    TRAINED_SINCE,
    Explained,
    TensorCheck,
    compare_weights,
    round_as_saved_,
    take_output_projections_,
)
from secateur.removal.left import Left
from secateur.removal.proof import TOLERANCE, cached_step, finite_step, hidden_states, largest_difference
from secateur.removal.remove import gated
from secateur.sites.finding import find_layers, find_units
from secateur.sites.layers import LayerSite
from secateur.sites.layout import Site
from secateur.sites.recipe import KINDS, TRAINED, Recipe, read_record
from secateur.support.interrupts import interruptible
from secateur.units.masks import Mask, PresentMask, vector_of


@interruptible
@torch.random.fork_rng([])  # transformers draws numbers for what it reads a moment later
def verify_checkpoint(
    folder: str | Path, against: str | Path | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Reload a pruned model and its original, and compare every tensor, and in float32 what both compute.

    `against` is the original; without it, the one that the checkpoint's recipe names, if that is on this machine: what
    a checkpoint names is not fetched. Each tensor must be what is left of the original's, in the dtype that it was
    saved in, but where the recipe says otherwise: of output projections that were `reconstructed`, and of a model that
    was `distilled` or `finetuned` since, which is not `equal`. Layers that went are taken out of the original too. The
    outputs are compared with the other units of the original gated, with refitted projections in both, and once more
    with the first token cached where there is a cache.

    The result has `equal`, and as `verdict` "equal", "trained" or, for what the recipe does not explain, "differs";
    `max_difference`, `max_step_difference` (None without a cache) and `tolerance` of the outputs; `tensors`, how many
    there are of each state that `TensorCheck` names, and in `differing` all that are not equal; `weights`, which are
    "as saved", "changed" since, namely those in `changed`, or "unknown" for files without digests; `against`, and the
    numbers of units `kept` and `dropped`, and of each kind in `units`, before and after.

    Raises `InvalidInputError` for a model that is not pruned, and where the original cannot be found, and
    `CheckpointError` for a recipe that is not the one that the weights were saved with.
    """
    pruned = load_model(folder, device)
    files = sorted(transformer_folder(Path(folder)).glob("*.safetensors")) if Path(folder).is_dir() else []
    changed = changed_tensors([file for file in files if file.is_file()])
    recipe = read_record(base_of(pruned).config)
    if recipe is None:
        raise InvalidInputError(f"{_without_recipe(folder)}, and which units stayed is not known")
    original, origin = load_original(pruned, folder, against, device, whole=True)
    kinds = {site.kind for site in recipe.sites.values()}
    before = find_units(original, kinds)
    sites, kept = _sites_left(original, recipe)
    said = {name: bool(recipe.record.get(name)) for name in ("reconstructed", *TRAINED)}
    explained = Explained(said["reconstructed"], any(said[name] for name in TRAINED))
    checks = compare_weights(pruned, original, sites, kept, explained)
    difference, step = _output_differences(pruned, original, sites, kept, said["reconstructed"])
    units = _units(recipe, before, kept)
    return {
        "folder": str(folder),
        "against": origin,
        **_verdict(checks, changed, max(difference, step or 0.0)),
        "max_difference": difference,
        "max_step_difference": step,
        "tolerance": TOLERANCE,
        "kept": sum(after for _, after in units.values()),
        "dropped": sum(before - after for before, after in units.values()),
        "units": {kind: list(counts) for kind, counts in units.items()},
        **said,
    }


def _sites_left(original: PreTrainedModel, recipe: Recipe) -> tuple[dict[str, Site], PresentMask]:
    """Take the layers out of the original that went; return its other sites, and what stays of them."""
    rows = {name: vector_of(kept, recipe.sites[name].num_units) for name, kept in recipe.kept.items()}
    gone = {name: row for name, row in rows.items() if isinstance(recipe.sites[name], LayerSite)}
    if gone:
        layers = find_layers(original)
        Left.of(original, layers, Mask(gone).present(layers), [])
    rest = {name: row for name, row in rows.items() if name not in gone}
    sites = find_units(original, {recipe.sites[name].kind for name in rest} or {LayerSite.kind})
    if rest:
        return sites, Mask(rest).present(sites)
    return sites, PresentMask({name: torch.ones(site.num_units, dtype=torch.bool) for name, site in sites.items()})


def _units(recipe: Recipe, before: Mapping[str, Site], kept: PresentMask) -> dict[str, tuple[int, int]]:
    """Return, for each kind of units that went, how many the original has, and the pruned model."""
    after: Counter[str] = Counter()
    for name, row in kept.items():
        after[recipe.sites[name].kind if name in recipe.sites else before[name].kind] += int(row.sum())
    for name, site in recipe.sites.items():
        if isinstance(site, LayerSite):
            after[site.kind] += len(recipe.kept[name])
    found = {}
    for kind in KINDS:
        if any(site.kind == kind for site in recipe.sites.values()):
            found[kind] = (sum(site.num_units for site in before.values() if site.kind == kind), after[kind])
    return found


def _verdict(checks: list[TensorCheck], changed: list[str] | None, difference: float) -> dict[str, Any]:
    """Return what the tensors' states, those that `changed` since they were saved, and the outputs come to."""
    counts = Counter(check.state for check in checks)
    if changed or any(counts[state] for state in DAMAGE):
        verdict = "differs"
    elif counts[TRAINED_SINCE]:
        verdict = "trained"
    else:
        verdict = "equal" if difference <= TOLERANCE else "differs"
    return {
        "equal": verdict == "equal",
        "verdict": verdict,
        "tensors": dict(counts),
        "differing": [asdict(check) for check in checks if check.state != EQUAL],
        "weights": "unknown" if changed is None else "changed" if changed else "as saved",
        "changed": changed or [],
    }


def _output_differences(
    pruned: PreTrainedModel,
    original: PreTrainedModel,
    sites: Mapping[str, Site],
    kept: PresentMask,
    reconstructed: bool,
) -> tuple[float, float | None]:
    """Return by how much the outputs differ from the gated original's, and those of a step with a cache, if any.

    Both models are float32 afterwards, and the original has the refitted projections, if any.
    """
    inputs = example_inputs(original)
    round_as_saved_(original, pruned)
    with gated(original, kept.original(sites), sites):
        if reconstructed:
            take_output_projections_(original, pruned, sites, kept)
        wanted = hidden_states(original.float(), inputs)
        wanted_step = finite_step(original, inputs)
    difference = largest_difference(wanted, hidden_states(pruned.float(), inputs))
    if wanted_step is None:
        return difference, None
    return difference, largest_difference(wanted_step, cached_step(pruned, inputs) or [])


def load_original(
    pruned: PreTrainedModel,
    folder: str | Path,
    against: str | Path | None = None,
    device: torch.device | str | None = None,
    *,
    whole: bool = False,
) -> tuple[PreTrainedModel, str]:
    """Return what the model loaded from `folder` was pruned from, `against` or what its recipe names, and its name.

    It is a base model; `whole`, it is of the class of `pruned`, its task's head included, if their configs are alike.
    Raises `InvalidInputError` where the original cannot be found.
    """
    recipe = read_record(base_of(pruned).config)
    name = against if recipe is None or against is not None else recipe.record.get("base_model")
    if recipe is None and name is None:
        raise InvalidInputError(f"{_without_recipe(folder)}; give the original with `--against`")
    if not isinstance(name, str | Path) or not str(name):
        raise InvalidInputError(f"{folder} does not say what it was pruned from; give the original with `--against`")
    source = name if against is not None else on_this_machine(name)
    if source is None:
        raise InvalidInputError(
            f"{folder} was pruned from {shown(name)}, which is not on this machine; what a checkpoint names is not "
            "fetched, so give the original with `--against`"
        )
    is_alike = whole and config_class(source) is type(pruned.config)
    original = load_model(source, device, type(pruned) if is_alike else AutoModel)
    sizes = [getattr(base_of(model).config, "vocab_size", None) for model in (pruned, original)]
    if sizes[0] != sizes[1]:
        raise InvalidInputError(f"{folder} was not pruned from {name}: their vocabularies have {sizes} tokens")
    return original, str(name)


def _without_recipe(folder: str | Path) -> str:
    return f"{folder} has neither a head_pruning nor a pruned_from entry in its config: it is not pruned"
