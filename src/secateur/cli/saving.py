"""How `prune` and `distill` save a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_model(model: Any, tokenizer: Any, source: str, folder: Path) -> None:
    """Write a model and its tokenizer into `folder` as they lie in `source`, a sentence-transformers folder perhaps."""
    from secateur.models.sentence_transformers import copy_modules
    from secateur.models.tokenizer_saving import save_tokenizer

    place = copy_modules(source, folder)
    model.save_pretrained(place)
    save_tokenizer(tokenizer, source, place)
