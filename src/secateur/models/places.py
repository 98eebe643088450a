"""What the files of a model's folder may name: other files in it, and no code of a Hub repository.

A link, or a path in a settings file, could bring any file of the reader's machine into a result that is passed on.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import import_utils

from secateur.errors import InvalidInputError, shown
from secateur.support.files import read_json

_TOKENIZER_SETTINGS = "tokenizer_config.json"
_NAMES_A_FILE = re.compile(r"vocab|merge|file|spm|bpe|dict|codes")
MOST_LAYERS = 10_000
_FLASH = re.compile(r"flash_attention_(\d)$")


def check_inside(path: Path, folder: Path) -> None:
    """Raise `InvalidInputError` unless `path` is a file or folder of `folder`, also where links end.

    In the cache of the Hub files are links to its store, which is beside the snapshots.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # `resolve` fails at a loop of links
    inside = [root]
    if root.parent.name == "snapshots" and not (store := root.parent.parent / "blobs").is_symlink():
        inside.append(store)
    if not any(target.is_relative_to(place) for place in inside):
        raise InvalidInputError(f"{path} must lie in its folder, got a link to {target}; put the file itself there")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InvalidInputError(f"{path} must be a file or a folder, got a pipe or a device; remove it")


def copy_file(path: Path, folder: Path, target: Path) -> None:
    """Copy a file that lies in `folder`. Raises what `check_inside` raises."""
    check_inside(path, folder)
    shutil.copyfile(path, target)


def copy_folder(path: Path, folder: Path, target: Path) -> None:
    """Copy a folder that lies in `folder`, with all in it. Raises what `check_inside` raises, before it copies.

    A link to nothing is refused too.
    """
    for one in _all_in(path, folder):
        check_inside(one, folder)
        if not one.exists():
            raise InvalidInputError(f"{one} must be a file or a folder, got a link to nothing; remove it")
    shutil.copytree(path, target, dirs_exist_ok=True)


def _all_in(path: Path, folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, links to folders followed once they are known to stay inside."""
    check_inside(path, folder)
    seen, waiting = set(), [path]
    while waiting:
        here = waiting.pop()
        if here.resolve() in seen:
            raise InvalidInputError(f"{here} must not be a link to what holds it; remove it")
        seen.add(here.resolve())
        for one in here.iterdir():
            yield one
            if one.is_dir():
                waiting.append(one)


def check_tokenizer_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise `InvalidInputError` where a tokenizer would read a file from outside its folder.

    Its files are those that begin with one of `names`, and those that its settings name.
    """
    for file in folder.iterdir():
        if file.name.startswith(names):
            check_inside(file, folder)
    file = folder / _TOKENIZER_SETTINGS
    settings: Any = read_json(file) if file.is_file() else {}
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, str) and _NAMES_A_FILE.search(str(key)) and _is_outside(value, folder):
            raise InvalidInputError(
                f"{file}: `{key}` must name no file outside the folder, got {shown(value)}; copy it there or remove it"
            )


def _is_outside(value: str, folder: Path) -> bool:
    """Is there such a file, and not in the folder? Old settings hold paths of other machines."""
    try:
        return Path(value).exists() and not Path(value).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # no name of a file at all
        return False


def check_no_kernels(settings: Any, where: str) -> None:
    """Raise `InvalidInputError` where a config asks for attention from a Hub repository, which is code."""
    waiting = [settings]
    while waiting:
        found = waiting.pop()
        for key, value in found.items() if isinstance(found, dict) else ():
            if key in ("attn_implementation", "_attn_implementation"):
                names = value.values() if isinstance(value, dict) else [value]
                for name in names:
                    if isinstance(name, str) and _is_fetched(name):
                        raise InvalidInputError(
                            f"{where}: `{key}` in the config must name code that is installed, got {shown(name)}; "
                            'remove it, or pass `attn_implementation="sdpa"` to `load_model`'
                        )
            elif isinstance(value, dict):
                waiting.append(value)


def check_depth(settings: Any, where: str) -> None:
    """Raise `InvalidInputError` where a config asks for more layers than any model has: to build them would not end."""
    waiting = [settings]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif "layer" in str(key) and isinstance(value, int) and value > MOST_LAYERS:
                raise InvalidInputError(f"{where}: `{shown(key)}` in the config must be at most {MOST_LAYERS}")


def _is_fetched(name: str) -> bool:
    name = name.removeprefix("paged|")
    flash = _FLASH.match(name)
    is_there = getattr(import_utils, f"is_flash_attn_{flash[1]}_available", None) if flash else None
    return "/" in name or (flash is not None and not (is_there is not None and is_there()))
