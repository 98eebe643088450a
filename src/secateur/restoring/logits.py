"""What a task's head says of texts, where it has learned to: logits that teach a pruned model, and that judge it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from secateur.models.loading import lacking
from secateur.texts.halving import is_out_of_memory

TEMPERATURE = 2.0
"""What logits are divided by before they are compared, so that unlikely classes count."""

MOST_TOKENS = 512
"""Tokens of a batch whose logits are compared at most, evenly spaced, since a vocabulary is wide."""


def task_pass(model: PreTrainedModel, arguments: Mapping[str, Any], **options: Any) -> tuple[Any, Tensor]:
    """Return the outputs of a task model for a batch as its base takes it, and its logits `[rows, classes]`.

    Rows are texts, or tokens that are no padding.
    """
    accepted = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    taken = {name: value for name, value in arguments.items() if takes_all or name in accepted}
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    places = None if ids is None else _places(ids)
    if places is not None and "logits_to_keep" in accepted:
        taken["logits_to_keep"] = places
    outputs = model(**taken, **options)
    logits: Tensor = outputs.logits
    if logits.ndim == 3 and ids is not None and places is not None:
        if logits.shape[1] == ids.shape[1]:
            logits = logits[:, places]
        if mask is not None and mask.shape == ids.shape and logits.shape[1] == len(places):
            logits = logits[mask[:, places].bool()]
    return outputs, logits.flatten(0, -2)


def _places(ids: Tensor) -> Tensor:
    """Return which tokens of each text are compared, the first and the last among them."""
    batch, length = ids.shape[:2]
    count = min(length, max(2, MOST_TOKENS // batch))
    return torch.linspace(0, length - 1, count, device=ids.device).round().long()


@torch.no_grad()
def learned_logits(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the logits of a batch, `[rows, classes]`, None where there are none or nobody has learned them.

    They count as learned unless the model was loaded by name and its files lacked weights: transformers draws those at
    random, as it does a new head's. Of a model that was loaded elsewhere that is not known.
    """
    if lacking(model):
        return None
    try:
        outputs, logits = task_pass(model, arguments)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None  # no logits, or a head that reads something else, as one for multiple choice does
    return logits if outputs.logits.ndim in (2, 3) and bool(logits.isfinite().all()) else None


def has_classes(model: PreTrainedModel, logits: Tensor) -> bool:
    """Return whether logits say which of several classes it is, rather than numbers or labels that stand alone."""
    alone = ("regression", "multi_label_classification")
    return logits.shape[-1] > 1 and getattr(model.config, "problem_type", None) not in alone


def logits_loss(found: Tensor, wanted: Tensor, of_classes: bool) -> Tensor:
    """Return how far logits `[rows, classes]` are from those that are wanted, mean over rows.

    Of classes KL(wanted ‖ found) of the softmax at `TEMPERATURE`, times its square, which keeps gradients as large as
    at 1 (Hinton et al. 2015, arXiv 1503.02531); else the squared difference.
    """
    found, wanted = found.float(), wanted.float()
    if not of_classes:
        return (found - wanted).square().mean()
    one, other = ((logits / TEMPERATURE).log_softmax(dim=-1) for logits in (found, wanted))
    return kl_div(one, other, reduction="batchmean", log_target=True) * TEMPERATURE**2
