"""Text representations and the relational loss between two sets of them (paper, steps 2 and 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import UnsupportedModelError, invalid
from secateur.models.finite import check_finite
from secateur.models.inputs import example_inputs
from secateur.models.state import evaluation_mode
from secateur.sites.gating import probe
from secateur.texts.batches import Batch

SCALE = 10.0
"""What the paper multiplies similarities by before the softmax."""


RELATED = 3
"""Texts that a batch needs to have relations: centred, two texts are opposite, whatever their representations are."""

_sees_all: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def by_first_token(model: PreTrainedModel, is_pair: bool) -> bool:
    """Return whether texts are represented by their first token: pairs are (paper, step 2), but for causal models.

    There the first token sees nothing but itself. Models that do not say so are found out by a small pass of their own
    over two inputs that differ in the last token, so that this is not to be asked while something reads along.
    """
    if not is_pair or any(getattr(module, "is_causal", False) for module in model.modules()):
        return False
    if model not in _sees_all:
        _sees_all[model] = _first_sees_last(model)
    return _sees_all[model]


@torch.no_grad()
def _first_sees_last(model: PreTrainedModel) -> bool:
    inputs = example_inputs(model, batch=1, padding=0)
    if "input_ids" not in inputs:
        return True
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    ids = other["input_ids"][0]
    ids[-1] = ids[ids != ids[-1]][0]
    with evaluation_mode(model):
        one, two = (getattr(model(**tokens), "last_hidden_state", None) for tokens in (inputs, other))
    return one is None or two is None or one.ndim != 3 or not torch.equal(one[:, 0], two[:, 0])


def represent(model: nn.Module, outputs: Any, batch: Mapping[str, Tensor], first_token: bool) -> Tensor:
    """Return one vector for each text, `[batch, width]` (paper, step 2).

    By the first token: the pooler's output for it, or its last hidden state where the model has no pooler. Else the
    mean of the last hidden states over real tokens. Which it is says `by_first_token`.
    """
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no last hidden states `[batch, tokens, width]`; score its base model, as "
            "`AutoModel` loads it: masks of one fit the other"
        )
    if first_token:
        pooled = getattr(outputs, "pooler_output", None)
        return hidden[:, 0] if pooled is None else pooled
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1)
    weights = mask.to(hidden).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def relations(representations: Tensor, scale: float = SCALE) -> Tensor:
    """Return log-probabilities of which of two neighbouring similarities is larger, `[n·n // 2, 2]` (paper, step 5).

    Representations `[n, width]` are centred by their mean and scaled to length 1; their similarities × `scale` are
    read row by row and cut into consecutive pairs, with a softmax over each. An odd last similarity is left out.
    """
    if representations.ndim != 2 or len(representations) < RELATED:
        raise invalid("representations", f"hold at least {RELATED} texts, [texts, width]", tuple(representations.shape))
    centred = representations - representations.mean(dim=0)
    rows = torch.nn.functional.normalize(centred, dim=1)
    similarities = (rows @ rows.T).flatten() * scale
    return similarities[: len(similarities) // 2 * 2].view(-1, 2).log_softmax(dim=1)


def with_relations(batches: Iterable[Batch]) -> list[Batch]:
    """Return the batches that have texts enough to have relations. Raises `InvalidInputError` where none has."""
    sizes = [(len(next(iter(batch.values()))), batch) for batch in batches]
    related = [batch for size, batch in sizes if size >= RELATED]
    if not related:
        rule = f"be at least {RELATED} a batch, as the relations between them count"
        most = max((size for size, _ in sizes), default=0)
        if all("input_ids" in batch for _, batch in sizes):
            raise invalid("texts", rule, most, "give more texts, or larger batches")
        raise invalid("inputs", rule, most, "give more of one shape, or larger batches")
    return related


def relational_kl(dense: Tensor, pruned: Tensor, scale: float = SCALE) -> Tensor:
    """Return the mean elementwise KL(dense ‖ pruned) between the relations of two sets of representations: ≥ 0 overall.

    Both are `[texts, width]`, of the same texts in the same order; 0 = the texts relate to each other as before. The
    mean is over the single entries of all pairs, half of the mean over pairs. Differentiable.
    """
    if dense.shape != pruned.shape:
        raise invalid("pruned", f"have the shape of `dense`, {tuple(dense.shape)}", tuple(pruned.shape))
    entries = torch.nn.functional.kl_div(
        relations(pruned.float(), scale), relations(dense.float(), scale), reduction="none", log_target=True
    )
    return entries.mean()


def gated_representations(model: PreTrainedModel, batch: Batch, gates: Mapping[str, Tensor], is_pair: bool) -> Tensor:
    """Return the representations `[texts, width]` of a batch under gates. Raises what `check_finite` raises."""
    first_token = by_first_token(model, is_pair)
    with probe(model, gates=gates):
        found = represent(model, model(**batch), batch, first_token)
        check_finite(found, model, partial(model, **batch))
    return found
