"""Checking a saved model again: every weight on disk, and what they compute, against the gated original."""

from __future__ import annotations

from collections import Counter
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
)
from secateur.removal.proof import TOLERANCE, cached_step, finite_step, hidden_states, largest_difference
from secateur.removal.remove import gated
from secateur.sites.attention import find_sites
from secateur.sites.layout import NOBODY
from secateur.sites.recipe import TRAINED, Recipe, read_recipe
from secateur.units.masks import Mask, vector_of


def verify_checkpoint(
    folder: str | Path, against: str | Path | None = None, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Reload a pruned model and its original, and compare every tensor, and in float32 what both compute.

    `against` is the original; without it, the one that the checkpoint's recipe names, if that is on this machine: what
    a checkpoint names is not fetched. Each tensor must be what is left of the original's, in the dtype that it was
    saved in, but where the recipe says otherwise: of output projections that were `reconstructed`, and of a model that
    was `distilled` or `finetuned` since, which is not `equal`. The outputs are compared with the original's heads
    gated, with refitted projections in both, and once more with the first token cached where there is a cache.

    The result has `equal`, and as `verdict` "equal", "trained" or, for what the recipe does not explain, "differs";
    `max_difference`, `max_step_difference` (None without a cache) and `tolerance` of the outputs; `tensors`, how many
    there are of each state that `TensorCheck` names, and in `differing` all that are not equal; `weights`, which are
    "as saved", "changed" since, namely those in `changed`, or "unknown" for files without digests; `against`, and the
    numbers of heads `kept` and `dropped`.

    Raises `InvalidInputError` for a model that is not pruned, and where the original cannot be found, and
    `CheckpointError` for a recipe that is not the one that the weights were saved with.
    """
    pruned = load_model(folder, device)
    files = sorted(transformer_folder(Path(folder)).glob("*.safetensors")) if Path(folder).is_dir() else []
    changed = changed_tensors(files)
    original, recipe, origin = load_original(pruned, folder, against, device, whole=True)
    mask = Mask({name: vector_of(kept, recipe.sites[name].num_units) for name, kept in recipe.kept.items()})
    said = {name: bool(recipe.record.get(name)) for name in ("reconstructed", *TRAINED)}
    sites = find_sites(original)
    explained = Explained(said["reconstructed"], any(said[name] for name in TRAINED))
    checks = compare_weights(pruned, original, sites, mask.present(sites), explained)
    difference, step = _output_differences(pruned, original, mask, recipe)
    return {
        "folder": str(folder),
        "against": origin,
        **_verdict(checks, changed, max(difference, step or 0.0)),
        "max_difference": difference,
        "max_step_difference": step,
        "tolerance": TOLERANCE,
        "kept": mask.num_kept,
        "dropped": mask.num_units - mask.num_kept,
        **said,
    }


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
    pruned: PreTrainedModel, original: PreTrainedModel, mask: Mask, recipe: Recipe
) -> tuple[float, float | None]:
    """Return by how much the outputs differ from the gated original's, and those of a step with a cache, if any.

    Both models are float32 afterwards, and the original has the refitted projections, if any.
    """
    inputs = example_inputs(original)
    round_as_saved_(original, pruned)
    with gated(original, mask):
        if recipe.record.get("reconstructed"):
            take_output_projections_(base_of(original), base_of(pruned), recipe)
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
) -> tuple[PreTrainedModel, Recipe, str]:
    """Return what the model loaded from `folder` was pruned from, its recipe, and the original's name.

    It is a base model; `whole`, it is of the class of `pruned`, its task's head included, if their configs are alike.
    Raises `InvalidInputError` for a model that is not pruned, and where the original cannot be found.
    """
    recipe = read_recipe(base_of(pruned).config)
    if recipe is None:
        raise InvalidInputError(
            f"{folder} has no head_pruning entry in its config: it is not pruned, or cut so that its config says all "
            "by its own numbers, and which units stayed is not known"
        )
    name = recipe.record.get("base_model") if against is None else against
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
    return original, recipe, str(name)


@torch.no_grad()
def take_output_projections_(original: PreTrainedModel, pruned: PreTrainedModel, recipe: Recipe) -> None:
    """Copy what the kept heads write with from the pruned model to the original; other weights stay.

    What does not fit, as in a model that is not the original, stays too: then the comparison tells.
    """
    sources = pruned.state_dict()
    for name, site in find_sites(original).items():
        stays = set(recipe.kept.get(name, site.units))
        kept = {NOBODY, *(number for number, head in enumerate(site.units) if head in stays)}
        for piece in site.slices_of("output"):
            there = torch.tensor([owner in kept for owner in piece.owners])
            rows = original.get_parameter(piece.parameter).movedim(piece.axis, 0)
            source = sources.get(piece.parameter)
            if source is not None and source.movedim(piece.axis, 0).shape == rows[there].shape:
                rows[there] = source.movedim(piece.axis, 0).to(rows)
