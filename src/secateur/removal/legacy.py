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

from secateur.errors import CheckpointError, shown
from secateur.models.sentence_transformers import transformer_folder
from secateur.sites.attention import find_sites
from secateur.sites.layout import AttentionSite
from secateur.sites.recipe import KEY, Recipe

V4_KEY = "pruned_heads"
_MOST_WEIGHTS = 500_000_000  # 2 GB; a layer of the largest models that transformers 4 pruned has half of it


def has_v4_pruning(source: str | Path) -> bool:
    """Does the config in this folder or Hub repository name `pruned_heads`? False where there is none to read."""
    try:
        folder = transformer_folder(Path(source)) if Path(source).is_dir() else source
        data, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # the last three: JSON of another form
        return False
    return isinstance(data, dict) and bool(data.get(V4_KEY))


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
            raise CheckpointError(f"`{V4_KEY}` names layer {shown(layer)}; {type(model).__name__} has {len(sites)}")
        site = sites[layer]
        if heads and max(heads) >= site.num_units:
            raise CheckpointError(
                f"`{V4_KEY}[{shown(layer)}]` must be heads below {site.num_units}, got {shown(sorted(heads))}"
            )
        kept[site.name] = tuple(h for h in range(site.num_units) if h not in heads)
        if not kept[site.name]:
            raise CheckpointError(
                f"`{V4_KEY}[{shown(layer)}]` must leave a head in the layer, got all {site.num_units}"
            )
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
        raise CheckpointError(
            f"`{V4_KEY}` in the config must map layers to lists of heads, got {shown(data)}"
        ) from None
    for layer, heads in pruned.items():
        if not all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads):
            raise CheckpointError(
                f"`{V4_KEY}[{shown(layer)}]` must be a list of head indices, got {shown(sorted(heads, key=str))}"
            )
    return pruned


def _sites_by_layer(model: PreTrainedModel) -> dict[int, AttentionSite]:
    """Find the sites on a twin with weights, since the model itself has none yet, and number them by layer.

    The twin has one layer, of which the others are copies: so it takes little memory, whatever the config asks for.
    """
    config: PreTrainedConfig = copy.deepcopy(model.config)
    delattr(config, V4_KEY)
    layers = {name: _layer(name) for name, _ in model.named_modules()}
    _make_small_(config)
    found: dict[int, AttentionSite] = {}
    for name, site in _sites_of_twin(type(model), config).items():
        alike = [other for other, (_, pattern) in layers.items() if pattern == _layer(name)[1] is not None]
        numbers = [layers[other][0] for other in alike]
        if not alike or found.keys() & set(numbers):
            raise CheckpointError(
                f"`{V4_KEY}` counts layers, but {type(model).__name__} has attention sites such as {name}, which are "
                "not its layers one to one; prune the original again with secateur"
            )
        try:
            found |= {n: AttentionSite.from_json(o, site.to_json()) for n, o in zip(numbers, alike, strict=True)}
        except ValueError as error:
            raise CheckpointError(f"`{V4_KEY}` cannot be read for {type(model).__name__}: {error}") from None
    return found


def _layer(module: str) -> tuple[int, str | None]:
    """Return the number of the one layer that a module's path names, and the path with it left out; else None."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
    return (int(numbers[0]), re.sub(r"\.\d+\.", ".#.", module)) if len(numbers) == 1 else (-1, None)


def _make_small_(config: PreTrainedConfig) -> None:
    """Leave one layer, and no more tokens than the config names, by the names that transformers gives them in all."""
    sizes = {"num_hidden_layers": 1}
    if isinstance(getattr(config, "vocab_size", None), int):
        tokens = [n for key, n in config.to_dict().items() if key.endswith("_token_id") and isinstance(n, int)]
        sizes["vocab_size"] = min(config.vocab_size, max([99, *tokens]) + 1)
    for name, size in sizes.items():
        setattr(config, name, size)


def _sites_of_twin(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, AttentionSite]:
    """Find the sites of a model with random weights. Raises `CheckpointError` where they would take too much memory."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > _MOST_WEIGHTS:
            raise CheckpointError(
                f"`{V4_KEY}` cannot be read for {model_class.__name__}: one layer of it has {size} weights, above "
                f"{_MOST_WEIGHTS}; prune the original again with secateur"
            )
        with torch.device("cpu"), torch.random.fork_rng([]):
            twin = model_class(config)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.normal_(std=0.02)
            return find_sites(twin)
    finally:
        torch.set_default_dtype(dtype)


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
