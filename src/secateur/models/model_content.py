"""What a model's content is known by: its config, weights and tokenizer, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import InvalidInputError
from secateur.models.loading import TOKENIZER_FILES, check_exists
from secateur.models.sentence_transformers import transformer_folder
from secateur.support.fingerprints import bytes_of, fingerprint

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_CONFIGS = ("config.json", "adapter_config.json")


def fingerprint_of_files(model: str | Path) -> str:
    """Return what tells the model in a folder, in a `.gguf` file or at a Hub id from others.

    Of files it is 16 hexadecimal digits of the SHA-256 of config, weights and tokenizer, about half a second for 500
    MB; of a Hub id it is the commit, which stands for all of its files. Raises `InvalidInputError` where there is none.
    """
    check_exists(model)
    path = Path(model)
    if path.is_file():
        return fingerprint(bytes_of(path))
    if path.is_dir():
        return fingerprint(chain.from_iterable(map(bytes_of, _files(transformer_folder(path)))))
    try:
        return Path(snapshot_download(str(model), allow_patterns="config.json")).name
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInputError(f"{model} is no folder, and the Hub did not give it: {reason}") from error


def fingerprint_of_model(model: PreTrainedModel) -> str:
    """Return what tells a model in memory from others, wherever it was loaded from: 16 hexadecimal digits.

    They are of the SHA-256 of its config and of every number of its weights; offloaded weights are left out.
    """
    about = {k: v for k, v in model.config.to_diff_dict().items() if k not in ("_name_or_path", "transformers_version")}
    config = json.dumps(about, sort_keys=True, default=str).encode()
    return fingerprint(chain([config], _weights(model.state_dict())))


def _files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in _WEIGHTS or file.name.startswith((*_CONFIGS, *TOKENIZER_FILES)))
    )


def _weights(state: dict[str, Any]) -> Iterator[Any]:
    for name, value in state.items():
        if isinstance(value, Tensor) and not value.is_meta:
            yield f"{name} {value.dtype} {tuple(value.shape)} ".encode()
            yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
