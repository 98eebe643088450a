"""A transformer that gives one embedding of a text beside its states, as sentence-transformers would make it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.errors import invalid
from secateur.finetuning.similarity import POOLINGS
from secateur.models.base_model import base_of


def with_embedding(model: PreTrainedModel, pooling: Sequence[str], normalised: bool) -> PreTrainedModel:
    """Return the base of `model`, whose passes from now on give `last_hidden_state` and `sentence_embedding`.

    `pooling` has names of `POOLINGS`, joined where there are several; `normalised` scales to length 1. Its inputs stay
    the same; it wants an attention mask. Raises `InvalidInputError` for a pooling of another name.
    """
    for name in pooling:
        if name not in POOLINGS:
            raise invalid("pooling", f"be among {', '.join(POOLINGS)}", name)
    base = base_of(model)
    kind: Any = type(base)

    @functools.wraps(kind.forward)  # who looks at the signature sees the model's own
    def forward(self: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        states = kind.forward(self, *args, **options)[0]
        mask = options["attention_mask"][..., None].to(states.dtype)
        made = torch.cat([POOLINGS[name](states, mask) for name in pooling], dim=1)
        made = torch.nn.functional.normalize(made) if normalised else made
        return {"last_hidden_state": states, "sentence_embedding": made}

    base.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return base
