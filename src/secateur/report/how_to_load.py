"""How the model in a pruned folder is loaded: what its card and its page show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from secateur.models.sentence_transformers import MODULES, SETTINGS, transformer_folder
from secateur.sites.recipe import KEY
from secateur.support.files import read_json


def how_to_load(folder: Path) -> dict[str, Any] | None:
    """Return the lines of Python that load a folder, as `code`, and whether it `needs_secateur`; None for no model.

    `library` is that of the class. A folder whose config has a recipe needs secateur, any other what it needed before.
    Raises `InvalidInputError` where a file that says so is damaged.
    """
    file = transformer_folder(folder) / "config.json"
    if not file.is_file():
        return None
    config = _object(file)
    if (folder / MODULES).is_file():
        package, named = "sentence_transformers", _object(folder / SETTINGS).get("model_type")
        name = named if isinstance(named, str) and named.isidentifier() else "SentenceTransformer"
        call = name
    else:
        package, named = "transformers", config.get("architectures")
        name = named[0] if isinstance(named, list) and named and _is_known(named[0]) else "AutoModel"
        call = f"{name}.from_pretrained"
    code = f'from {package} import {name}\n\nmodel = {call}("FOLDER")'
    needs_secateur = config.get(KEY) is not None
    first = "import secateur  # first\n" if needs_secateur else ""
    return {"code": first + code, "needs_secateur": needs_secateur, "library": package.replace("_", "-")}


def _is_known(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and hasattr(transformers, name)


def _object(file: Path) -> dict[str, Any]:
    """Read an object, empty where the file is not there or holds another thing."""
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
