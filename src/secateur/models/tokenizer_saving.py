"""The tokenizer beside a model that is saved, and the files with which images, speech and video are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME
from transformers.utils.hub import CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from secateur.models.hub_access import answers
from secateur.models.places import copy_file
from secateur.models.sentence_transformers import transformer_folder

_NOTE = "_secateur_tokenizer"  # on a pruned model: what it reads texts with, which is saved with it
_PROCESSOR_FILES = (
    PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, "video_preprocessor_config.json", "audio_tokenizer_config.json",
    CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)  # fmt: skip


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, source: str | Path | None, folder: Path) -> None:
    """Write the tokenizer, where there is one, into `folder`, and copy what processors have in `source`.

    `source` is a folder, or a Hub id: of that no more than these small files are fetched. None has none.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if source is None:
        return
    origin = transformer_folder(Path(source)) if Path(source).is_dir() else _from_hub(str(source))
    for name in _PROCESSOR_FILES:
        if origin is not None and (origin / name).is_file() and not (folder / name).exists():
            copy_file(origin / name, origin, folder / name)


def note_tokenizer_(model: nn.Module, tokenizer: Any) -> None:
    """Keep with a model the tokenizer that `save_pretrained` is to write beside it."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        setattr(model, _NOTE, tokenizer)


def save_noted_tokenizer(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True, *_: Any, **__: Any
) -> None:
    """Write the noted tokenizer, if any, unless the folder has one; takes what `save_pretrained` takes."""
    tokenizer = getattr(model, _NOTE, None)
    if tokenizer is not None and is_main_process and not (Path(save_directory) / TOKENIZER_CONFIG_FILE).exists():
        tokenizer.save_pretrained(save_directory)


def _from_hub(repository: str) -> Path | None:
    """Fetch the processors' files of a Hub repository; None where it is not there."""
    if Path(repository).exists():  # a file, such as a .gguf, has none beside it
        return None
    try:
        return Path(
            snapshot_download(repository, allow_patterns=list(_PROCESSOR_FILES), local_files_only=not answers())
        )
    except (OSError, ValueError):
        return None
