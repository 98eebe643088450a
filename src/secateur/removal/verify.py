"""Checking a saved model again: what lies on disk, reloaded, against the gated original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, PreTrainedModel

from secateur.errors import InvalidInputError, shown
from secateur.models.base_model import base_of
from secateur.models.inputs import example_inputs
from secateur.models.loading import load_model
from secateur.removal.moved import Moved, moved_path, moved_recipe
from secateur.removal.proof import TOLERANCE, hidden_states, largest_difference
from secateur.removal.remove import gated
from secateur.sites.finding import units_named
from secateur.sites.layers import LayerSite
from secateur.sites.layout import NOBODY
from secateur.sites.recipe import Recipe, read_recipe
from secateur.units.masks import Mask


def verify_checkpoint(
    folder: str | Path, against: str | Path | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Reload a pruned model and its original, gate the original, and compare their outputs in float32.

    `against` is the original; without it, the one that the checkpoint's recipe names, if that is on this machine: what
    a checkpoint names is not fetched. The result has `equal`, `max_difference`, `tolerance`, `against`, and the numbers
    of units `kept` and `dropped`. A model that was fine-tuned or `distilled` after pruning differs, as it should. Where
    output projections were `reconstructed`, the original is compared with those of the pruned model in the place of its
    own.

    Raises `InvalidInputError` for a model that is not pruned, and where the original cannot be found.
    """
    pruned = load_model(folder, device, AutoModel)
    original, recipe, original_name = load_original(pruned, folder, against, device)
    if recipe is None:
        raise _without_recipe(folder)
    layers = _layers_of(recipe)
    theirs = moved_recipe(recipe, {new: old for old, new in layers.items() if new is not None})  # the original's names
    vectors = {}
    for name, kept in theirs.kept.items():
        vectors[name] = torch.zeros(theirs.sites[name].num_units, dtype=torch.bool)
        vectors[name][list(kept)] = True
    mask = Mask(vectors)
    reconstructed, distilled = (bool(recipe.record.get(name)) for name in ("reconstructed", "distilled"))
    inputs = example_inputs(original)
    if reconstructed:
        take_output_projections_(base_of(original), base_of(pruned), theirs, layers)
    with gated(original, mask):
        wanted = hidden_states(original.float(), inputs)
    difference = largest_difference(wanted, hidden_states(pruned.float(), inputs))
    return {
        "folder": str(folder),
        "against": original_name,
        "equal": difference <= TOLERANCE,
        "max_difference": difference,
        "tolerance": TOLERANCE,
        "kept": mask.num_kept,
        "dropped": mask.num_units - mask.num_kept,
        "reconstructed": reconstructed,
        "distilled": distilled,
    }


def load_original(
    pruned: PreTrainedModel,
    folder: str | Path,
    against: str | Path | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, Recipe | None, str]:
    """Return what the model loaded from `folder` was pruned from, its recipe where it has one, and the original's name.

    Raises what `verify_checkpoint` raises.
    """
    recipe = read_recipe(base_of(pruned).config)
    if recipe is None and against is None:
        raise _without_recipe(folder)
    name = recipe.record.get("base_model") if recipe is not None and against is None else against
    if not isinstance(name, str | Path) or not str(name):
        raise InvalidInputError(f"{folder} does not say what it was pruned from; give the original with `--against`")
    original = load_model(name if against is not None else _on_this_machine(name, folder), device, AutoModel)
    sizes = [getattr(base_of(model).config, "vocab_size", None) for model in (pruned, original)]
    if sizes[0] != sizes[1]:
        raise InvalidInputError(f"{folder} was not pruned from {name}: their vocabularies have {sizes} tokens")
    return original, recipe, str(name)


def _without_recipe(folder: str | Path) -> InvalidInputError:
    return InvalidInputError(
        f"{folder} has no head_pruning entry in its config: it is not pruned, or cut so that its config says all by "
        "its own numbers, and which units stayed is not known"
    )


def _layers_of(recipe: Recipe) -> Moved:
    """Return the present path of every layer of the original whose list lost some, None where it is gone."""
    moved: dict[str, str | None] = {}
    for name, site in recipe.sites.items():
        if isinstance(site, LayerSite):
            places = {old: new for new, old in enumerate(recipe.kept[name])}
            for old in range(site.original_num_units):
                moved[f"{name}.{old}"] = f"{name}.{places[old]}" if old in places else None
    return moved


@torch.no_grad()
def take_output_projections_(original: PreTrainedModel, pruned: PreTrainedModel, recipe: Recipe, layers: Moved) -> None:
    """Copy what the kept units write with from the pruned model to the original; other weights stay.

    `recipe` has the original's names of sites, `layers` the present paths of its layers. What does not fit, as in a
    model that is not the original, stays too: then the comparison tells.
    """
    sources = pruned.state_dict()
    for name, site in units_named(original, recipe.sites).items():
        stays = set(recipe.kept.get(name, site.units))
        kept = {NOBODY, *(number for number, head in enumerate(site.units) if head in stays)}
        for piece in site.slices_of("output"):
            there = torch.tensor([owner in kept for owner in piece.owners])
            rows = original.get_parameter(piece.parameter).movedim(piece.axis, 0)
            source = sources.get(moved_path(piece.parameter, layers) or "")
            if source is not None and source.movedim(piece.axis, 0).shape == rows[there].shape:
                rows[there] = source.movedim(piece.axis, 0).to(rows)


def _on_this_machine(name: str | Path, folder: str | Path) -> str | Path:
    """Return where the model is that a checkpoint names, in its own folder or the cache of the Hub's files."""
    if Path(name).exists():
        return name
    try:
        return snapshot_download(str(name), local_files_only=True)
    except (OSError, ValueError):
        raise InvalidInputError(
            f"{folder} was pruned from {shown(name)}, which is not on this machine; what a checkpoint names is not "
            "fetched, so give the original with `--against`"
        ) from None
