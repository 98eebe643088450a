"""sentence-transformers: where the transformer in a folder or a model is, and how the other modules come along.

Such a folder has a `modules.json`, an ordered list of modules, each with the folder that it is saved in: a transformer
(in the folder itself, or in one of its own), then pooling, normalisation and the like. The package itself is not needed
to read it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError, invalid, shown
from secateur.models.hub_access import answers
from secateur.models.places import copy_file, copy_folder
from secateur.support.files import read_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_OWN_FILES = (MODULES, SETTINGS)
_NAMES = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}
_LONGEST = 255  # bytes of a name
_TRANSFORMER_FILES = "sentence_*_config.json"  # such as the longest text that is read


def transformer_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a SentenceTransformer, whose first module holds it, or else the model."""
    first = model[0] if isinstance(model, nn.Sequential) and len(model) else None
    inner = getattr(first, "auto_model", None)
    return inner if isinstance(inner, PreTrainedModel) else model


def transformer_folder(folder: Path) -> Path:
    """Return where the transformer's config and weights are: `folder` itself, or the module's own folder in it."""
    place = _transformer(_modules(folder))
    return folder / (place or "")


def copy_modules(source: str | Path, folder: Path) -> Path:
    """Copy all modules but the transformer from `source` into `folder`, and return where the transformer goes.

    For a `source` without modules nothing is copied and that is `folder`. A Hub id is looked up there.
    """
    origin, modules = _of(source)
    place = _transformer(modules)
    if origin is None or place is None:
        return folder
    target = folder / place
    target.mkdir(parents=True, exist_ok=True)
    for name in _OWN_FILES:
        if (origin / name).is_file():
            copy_file(origin / name, origin, folder / name)
    for file in (origin / place).glob(_TRANSFORMER_FILES):
        if file.is_file():
            copy_file(file, origin, target / file.name)
    for module in modules:
        path = module["path"]
        if path and path != place:
            # A module without settings, such as normalisation, may have been published without its empty folder.
            (folder / path).mkdir(parents=True, exist_ok=True)
            if (origin / path).is_dir():
                copy_folder(origin / path, origin, folder / path)
    return target


def pooling_of(source: str | Path) -> tuple[str, ...]:
    """Return by which of sentence-transformers' poolings a folder or Hub id makes one embedding of a text's tokens.

    That is ("mean",) where it has no modules. Raises `InvalidInputError` for a module that would change embeddings
    after the pooling, and for settings of the pooling that are damaged.
    """
    return _embedding(*_of(source), "evaluate it with sentence-transformers itself")[0]


def embedding_of(source: str | Path) -> tuple[tuple[str, ...], bool] | None:
    """Return by which poolings a folder or Hub id makes one embedding, and whether that is scaled to length 1.

    None where it has no module that pools. Raises what `pooling_of` raises.
    """
    origin, modules = _of(source)
    if "Pooling" not in map(_kind, modules):
        return None
    return _embedding(origin, modules, "export it without its modules.json, and do in your code what its modules do")


def _of(source: str | Path) -> tuple[Path | None, list[dict[str, str]]]:
    origin = Path(source) if Path(source).exists() else _from_hub(str(source))
    return origin, _modules(origin) if origin is not None else []


def _kind(module: dict[str, str]) -> str:
    return module["type"].rpartition(".")[2]


def _embedding(origin: Path | None, modules: list[dict[str, str]], remedy: str) -> tuple[tuple[str, ...], bool]:
    found: tuple[str, ...] = ("mean",)
    for module in modules:
        kind = _kind(module)
        if kind == "Pooling" and origin is not None:
            found = _pooling(origin / module["path"] / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise invalid("model", "have no modules but a transformer, pooling and normalisation", kind, remedy)
    return found, "Normalize" in map(_kind, modules)


def _pooling(file: Path) -> tuple[str, ...]:
    """Read the settings of a pooling: today one name or several, before a switch for each name."""
    try:
        settings: Any = read_json(file)
        named = settings.get("pooling_mode")
        if named is None:
            switches = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
            named = [_NAMES.get(name, name) for name in (s.removeprefix("pooling_mode_") for s in switches)]
        return (named,) if isinstance(named, str) else tuple(map(str, named)) or ("mean",)
    except (OSError, ValueError, AttributeError, TypeError):
        raise InvalidInputError(f"{file} holds no settings of a pooling") from None


def _modules(folder: Path) -> list[dict[str, str]]:
    """Read the list, empty where there is none. Raises `InvalidInputError` for one that is damaged."""
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        listed: Any = read_json(file)
        modules = [{"path": str(m["path"]), "type": str(m["type"])} for m in listed]
        places = [Path(os.path.realpath(folder / module["path"])) for module in modules]  # a NUL character is none
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(f"{file} is no list of modules with `path` and `type`") from None
    for module, place in zip(modules, places, strict=True):
        if not place.is_relative_to(os.path.realpath(folder)):
            raise InvalidInputError(f"{file} names a path outside its folder: {shown(module['path'])}")
        if not module["path"].isprintable():
            raise InvalidInputError(f"{file} names a path that cannot be shown: {shown(module['path'])}")
        if max(map(len, module["path"].encode().split(b"/"))) > _LONGEST:
            raise InvalidInputError(f"{file} names a path that no disk takes: {shown(module['path'])}")
        if any(part.is_file() for part in (place, *place.parents)):
            raise InvalidInputError(f"{file} names a file for a module's folder: {shown(module['path'])}")
    return modules


def _transformer(modules: list[dict[str, str]]) -> str | None:
    return next((m["path"] for m in modules if _kind(m) == "Transformer"), None)


def _from_hub(repository: str) -> Path | None:
    """Fetch the small files of a Hub repository's modules, not its weights; None where it has none or is not there."""
    from huggingface_hub import snapshot_download

    wanted = [*_OWN_FILES, _TRANSFORMER_FILES, "[0-9]*_*/*", "[0-9]*_*/**"]
    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=wanted,
                ignore_patterns=["0_*/*.safetensors", "0_*/*.bin"],
                local_files_only=not answers(),
            )
        )
    except (OSError, ValueError):
        return None
