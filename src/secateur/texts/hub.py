"""Data sets of the Hugging Face Hub: their ids, and a split of theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from secateur.errors import InvalidInputError, invalid
from secateur.models.hub_access import check_in_reach, is_data_fetched
from secateur.support.parsing import short
from secateur.texts.rows import FILE_FORMATS, SPLIT_NAMES, stem_and_format

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def hub_id(data: str | Path) -> tuple[str, str | None]:
    """Split a Hub id into repository and configuration, or raise for what can only be a path."""
    text = str(data)
    is_path = (
        isinstance(data, Path) or text.startswith((".", "/", "~")) or stem_and_format(Path(text))[1] in FILE_FORMATS
    )
    match = _HUB_ID.fullmatch(text)
    if is_path or match is None:
        remedy = "" if is_path else "a Hub id looks like glue/sst2, owner/name or owner/name:config"
        raise invalid("data", "name a file or a folder that exists", text, remedy)
    if text.startswith("glue/"):
        return "nyu-mll/glue", text.removeprefix("glue/")
    return match[1], match[2]


def hub_split(data: str | Path, split: str, **options: Any) -> Any:
    """Return a split as `datasets.load_dataset` gives it, which takes the options.

    Raises `InvalidInputError` where the Hub does not give the data, and where these have no such split.
    """
    import datasets

    repository, config = hub_id(data)
    # A client that is told to stay offline says no at once, and knows what it has.
    is_there = constants.HF_HUB_OFFLINE or is_data_fetched(repository, datasets.config.HF_DATASETS_CACHE)
    check_in_reach(str(data), is_there)
    try:
        splits = datasets.load_dataset(repository, config, **options)
    except Exception as error:  # the Hub, the network and each file format fail with types of their own
        raise InvalidInputError(
            f"{str(data)!r} is no local file or folder, and the Hub did not give it ({short(error)}); "
            "give a local file instead"
        ) from error
    name = next((name for name in SPLIT_NAMES[split] if name in splits), None)
    if name is None:
        raise InvalidInputError(f"{data} has no {split} split: found {', '.join(splits)}")
    return splits[name]
