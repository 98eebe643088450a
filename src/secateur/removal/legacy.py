"""What transformers 4 left behind: checkpoints with `pruned_heads`, and callers that still pass `head_mask`.

transformers 5 reads neither: the checkpoint's smaller weights do not fit, and the mask is ignored without a word.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from secateur.errors import CheckpointError
from secateur.models.sentence_transformers import transformer_folder
from secateur.sites.attention import find_sites
from secateur.sites.layout import AttentionSite
from secateur.sites.recipe import KEY, Recipe

V4_KEY = "pruned_heads"


def has_v4_pruning(source: str | Path) -> bool:
    """Does the config in this folder or Hub repository name `pruned_heads`? False where there is none to read."""
    try:
        folder = transformer_folder(Path(source)) if Path(source).is_dir() else source
        data, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError):
        return False
    return bool(data.get(V4_KEY))


def adopt_v4_(model: PreTrainedModel) -> None:
    """Turn the `pruned_heads` in the model's config, layer → pruned heads, into a recipe; the weights come later.

    Waits for the base model while a part of it is under construction. Raises `CheckpointError` for entries that are no
    layers and heads of the model, and for models whose layers are not its attention sites one to one.
    """
    config = model.config
    known = MODEL_MAPPING.get(type(config), None)
    if type(model) not in (known if isinstance(known, tuple) else (known,)):
        return
    pruned = _read(getattr(config, V4_KEY))
    sites = _sites_by_layer(model)
    kept = {site.name: tuple(range(site.num_units)) for site in sites.values()}
    for layer, heads in pruned.items():
        if layer not in sites:
            raise CheckpointError(f"`{V4_KEY}` names layer {layer}; {type(model).__name__} has {len(sites)}")
        site = sites[layer]
        if heads and max(heads) >= site.num_units:
            raise CheckpointError(f"`{V4_KEY}[{layer}]` must be heads below {site.num_units}, got {sorted(heads)}")
        kept[site.name] = tuple(h for h in range(site.num_units) if h not in heads)
        if not kept[site.name]:
            raise CheckpointError(f"`{V4_KEY}[{layer}]` must leave a head in the layer, got all {site.num_units}")
    total = sum(site.num_units for site in sites.values())
    ratio = 1 - sum(map(len, kept.values())) / total
    recipe = Recipe(kept, {s.name: s for s in sites.values()}, record={"pruning_ratio": round(ratio, 6)})
    setattr(config, KEY, recipe.to_json())
    delattr(config, V4_KEY)  # saved again, the checkpoint is one of today's


def _read(data: Any) -> dict[int, set[int]]:
    """Check and convert `{"0": [1, 2]}`."""
    try:
        pruned = {int(layer): {*heads} for layer, heads in data.items()}
    except (AttributeError, TypeError, ValueError):
        raise CheckpointError(f"`{V4_KEY}` in the config must map layers to lists of heads, got {data!r:.80}") from None
    for layer, heads in pruned.items():
        if not all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads):
            raise CheckpointError(f"`{V4_KEY}[{layer}]` must be a list of head indices, got {sorted(heads, key=str)}")
    return pruned


def _sites_by_layer(model: PreTrainedModel) -> dict[int, AttentionSite]:
    """Find the sites on a twin with weights, since the model itself has none yet, and number them by layer."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    delattr(config, V4_KEY)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.random.fork_rng([]):
            twin = type(model)(config)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.normal_(std=0.02)
            sites = find_sites(twin)
    finally:
        torch.set_default_dtype(dtype)
    layers: dict[int, AttentionSite] = {}
    for name, site in sites.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if len(numbers) != 1 or int(numbers[0]) in layers:
            raise CheckpointError(
                f"`{V4_KEY}` counts layers, but {type(model).__name__} has attention sites such as {name}, which are "
                "not its layers one to one; prune the original again with secateur"
            )
        layers[int(numbers[0])] = site
    return layers


_warned = False


def warn_of_head_mask(model: PreTrainedModel) -> None:
    """Say, once, that `head_mask` does nothing."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{type(model).__name__} was called with `head_mask`, which transformers 5 ignores; "
            "`secateur.gated(model, mask)` gates heads",
            stacklevel=3,
        )
