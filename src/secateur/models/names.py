"""What a model says that it is. One that lost heads is no longer what it was loaded from, and must not say so.

PEFT writes the name of a model into its adapters, and loads that model for them; model cards name it as what they tell
of. So the name goes with the heads, as of a model that was built from a config, until the model is loaded from a folder
of its own. Where its tokenizer is, and what it was, the original's name still says.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_ORIGIN = "_secateur_origin"  # on a model that lost heads: its name before


def original_name(model: nn.Module) -> str:
    """Return what the model was loaded from, also where it has lost heads since; empty where it was not loaded."""
    return str(getattr(model, "name_or_path", "") or vars(model).get(_ORIGIN, ""))


def forget_names_(model: nn.Module) -> None:
    """Let the model, its parts and their configs, which are its own, have no name."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if name := original_name(module):
                vars(module)[_ORIGIN] = name
            module.name_or_path = ""
        config: Any = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config.name_or_path = ""
