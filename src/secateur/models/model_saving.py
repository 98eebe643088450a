"""A model and all that lies beside it, saved as it was found: its tokenizer, processors, and other modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.models.sentence_transformers import copy_modules, transformer_of
from secateur.models.tokenizer_saving import save_tokenizer


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, source: str, folder: Path) -> None:
    """Write a model and its tokenizer into `folder` as they lie in `source`, a sentence-transformers folder perhaps.

    `source` is empty for a model that was not loaded by name. A SentenceTransformer writes what it has.
    """
    whole: Any = model
    if transformer_of(model) is not model:
        whole.save_pretrained(str(folder))
        return
    place = copy_modules(source, folder) if source else folder
    whole.save_pretrained(place)
    save_tokenizer(tokenizer, source or None, place)
