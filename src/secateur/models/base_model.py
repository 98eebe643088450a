"""The model inside a task model, which holds the sites; it lies beside every standalone export too."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the encoder or decoder inside a task model (`BertModel` inside `BertForSequenceClassification`).

    Sites are named relative to it, so that scores and masks carry over between a base model and its task models.
    Raises `TypeError` for anything that is no transformers model, with the way to get one.
    """
    if not isinstance(model, PreTrainedModel):
        hint = "pass the transformers model inside it (PEFT: `get_base_model()`, SentenceTransformer: `[0].auto_model`)"
        hint = how_to_load(model) or hint
        raise TypeError(f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}; {hint}")
    base: PreTrainedModel = model.base_model
    while base.base_model is not base:  # DPR wraps twice
        base = base.base_model
    return base


def how_to_load(model: object) -> str:
    """Return the remedy for a folder or Hub id where a loaded model is due, empty for anything else."""
    named = isinstance(model, str | Path) and str(model)
    return f"load it: secateur.models.loading.load_model({str(model)!r})" if named else ""
