"""What a folder was pruned from, as its recipe names it, where that is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig

from secateur.models.sentence_transformers import transformer_folder


def on_this_machine(name: str | Path) -> str | Path | None:
    """Return where the model of that name is, in its own folder or the cache of the Hub's files; None elsewhere.

    What a checkpoint names is not fetched.
    """
    if Path(name).exists():
        return name
    try:
        return snapshot_download(str(name), local_files_only=True)
    except (OSError, ValueError):
        return None


def recorded_original(model: str | Path) -> str | None:
    """Return what the recipe in the config of a folder, or of a Hub id whose files are here, names as the original."""
    config = _config(model)
    recipe = config.get("head_pruning", config.get("pruned_from"))
    name = recipe.get("base_model") if isinstance(recipe, dict) else None
    return name if isinstance(name, str) and name else None


def originals(model: str | Path) -> Iterator[str | Path]:
    """Yield where the model is that `model` was pruned from, then what that was pruned from, while they are here.

    One of another vocabulary cannot be the original, whatever it is called: the name may be of a folder that changed.
    """
    seen: set[str] = set()
    size = _config(model).get("vocab_size")
    while (name := recorded_original(model)) is not None and name not in seen:
        seen.add(name)
        place = on_this_machine(name)
        if place is None or _config(place).get("vocab_size", size) != size:
            return
        yield place
        model = place


def _config(model: str | Path) -> dict[str, Any]:
    """Return the config as its file has it, empty where there is none to read."""
    try:
        source = transformer_folder(Path(model)) if Path(model).is_dir() else model
        data = PreTrainedConfig.get_config_dict(source, local_files_only=True)[0]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # the last three: JSON of another form
        return {}
    return data if isinstance(data, dict) else {}
