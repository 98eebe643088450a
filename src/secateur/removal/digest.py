"""Digests beside the weights of a pruned model: was its recipe, or a weight, changed after they were saved?

Another recipe with as many heads at every site fits the same weights and computes something else, and a weight that
reads well may be another than was saved. So `save_pretrained` writes into the metadata of each safetensors file of a
pruned model the digests of its recipes and of the file's tensors. `from_pretrained` refuses a recipe that the files do
not know; `secateur verify` reads the tensors again too. Files without digests load as they are.

Imported while transformers is: see checkpoint.py.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.support.parsing import parse_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

RECIPES, WEIGHTS = "secateur_recipes", "secateur_weights"  # in a file's metadata: a list, and tensor → digest
_SIGNS = 16  # hexadecimal ones of a tensor's SHA-256: against accidents, not against forgers

_READ = "_secateur_read"  # on a model that follows a part of its folder's recipe: the digests of the whole

_saving: ContextVar[tuple[str, ...]] = ContextVar("secateur_saving", default=())
"""The recipes of the model that is being saved in this thread."""


def install(modeling_utils: Any) -> None:
    """Let transformers write digests with a pruned model's weights, and compare the recipe before it reads them."""
    root = modeling_utils.PreTrainedModel
    save, write = root.save_pretrained, modeling_utils.safe_save_file
    method = vars(root)["_load_pretrained_model"]  # of the class in transformers 5.0, static in later ones
    load = method.__func__

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        adapter_alone = self._hf_peft_config_loaded  # which other models may take, too
        token = _saving.set(() if adapter_alone else tuple(sorted(recipe_digests(self.config))))
        try:
            return save(self, *args, **kwargs)
        finally:
            _saving.reset(token)

    @functools.wraps(write)
    def save_file(tensors: dict[str, Tensor], filename: Any, metadata: dict[str, str] | None = None) -> Any:
        recipes = _saving.get()
        if not recipes:
            return write(tensors, filename, metadata=metadata)
        weights = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        write(tensors, filename, {**(metadata or {}), RECIPES: json.dumps(recipes), WEIGHTS: json.dumps(weights)})
        _sort_metadata_(filename)
        return None

    @functools.wraps(load)
    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(*args, **kwargs).arguments
        model = given["model"]
        digests = vars(model).pop(_READ, None) or recipe_digests(model.config)
        check_recipes(digests, given.get("checkpoint_files") or ())
        return load(*args, **kwargs)

    root.save_pretrained = save_pretrained
    modeling_utils.safe_save_file = save_file
    root._load_pretrained_model = type(method)(load_pretrained_model)


def _sort_metadata_(file: str | Path) -> None:
    """Put the metadata of a safetensors file in order: safetensors' own is another each time, equal models are not."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else it was written by other rules than JSON's shortest form
            opened.seek(8)
            opened.write(text.ljust(size))


def recipe_digests(config: PreTrainedConfig) -> set[str]:
    """Return the digest of every recipe that a config holds, its own and those of configs within it.

    What a recipe has for the record, such as where the original lies, may change and is left out.
    """
    return set(map(_recipe_digest, recipes_in(config)))


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's shape, dtype and bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()[:_SIGNS]


def note_recipes_(model: PreTrainedModel) -> None:
    """Keep what the recipes are that the model's config was read with, before it is given others."""
    setattr(model, _READ, recipe_digests(model.config))


def check_recipes(digests: set[str], files: Iterable[str | Path]) -> None:
    """Raise `CheckpointError` for a recipe that weights in `files` were not saved with."""
    for file in files:
        known = _metadata(file).get(RECIPES)
        if isinstance(known, list) and not digests <= {one for one in known if isinstance(one, str)}:
            from secateur.errors import CheckpointError

            raise CheckpointError(
                f"the `head_pruning` recipe in the config is not the one that the weights in {file} were saved with: "
                "other heads or layouts; restore the config.json, or save the model again where it was pruned"
            )


def changed_tensors(files: Iterable[str | Path]) -> list[str] | None:
    """Return the tensors that are not what was saved, or are gone, or new; None where a file has no digests."""
    from safetensors import safe_open

    changed: list[str] = []
    read = False
    for file in files:
        wanted = _metadata(file).get(WEIGHTS)
        if not isinstance(wanted, dict):
            return None
        read = True
        with safe_open(file, "pt") as opened:
            there = set(opened.keys())
            changed += [
                name
                for name in sorted(there | wanted.keys())
                if name not in there or tensor_digest(opened.get_tensor(name)) != wanted.get(name)
            ]
    return changed if read else None


def _metadata(file: str | Path) -> Mapping[str, Any]:
    """Return what secateur wrote into the metadata of a safetensors file: nothing where it did not, or nobody can."""
    from safetensors import SafetensorError, safe_open

    if Path(file).suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            found = opened.metadata() or {}
        return {name: parse_json(found[name], str(file)) for name in (RECIPES, WEIGHTS) if name in found}
    except (SafetensorError, OSError, ValueError):
        return {}  # who reads the weights says what is wrong with the file


def _recipe_digest(recipe: Mapping[str, Any]) -> str:
    from secateur.sites.recipe import FOLLOWED

    followed = {name: value for name, value in recipe.items() if name in FOLLOWED}
    return hashlib.sha256(json.dumps(followed, sort_keys=True).encode()).hexdigest()


def recipes_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the recipes in a config, in the configs within it, and in those that lie there as plain data."""
    from transformers import PreTrainedConfig

    entries = vars(value) if isinstance(value, PreTrainedConfig) else value
    if isinstance(entries.get("head_pruning"), dict):
        yield entries["head_pruning"]
    for name, inner in entries.items():
        if name != "head_pruning" and isinstance(inner, PreTrainedConfig | dict):
            yield from recipes_in(inner)
