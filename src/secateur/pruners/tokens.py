"""Which tokens of a batch count, and means over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.texts.batches import Batch


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average `[batch, tokens, heads]` over the tokens that `mask` `[batch, tokens]` marks with 1: `[batch, heads]`.

    A mask of another shape counts as none, as a decoder's tokens have none here. A text without any such token gets 0.
    """
    if mask is None or mask.shape != values.shape[:2]:
        return values.mean(dim=1)
    weights = mask.to(values).unsqueeze(-1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def in_decoder(model: PreTrainedModel, site: str) -> bool:
    """Whether a site of a base model lies in a decoder beside an encoder, whose tokens are not those of `input_ids`.

    BART's, for one, reads them one place later where it is given no `decoder_input_ids`.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    decoder = model.get_decoder()
    places = [name for name, module in model.named_modules() if module is decoder and module is not model]
    return any(site.startswith(f"{place}.") for place in places)


def words_of(batch: Batch, special_ids: frozenset[int]) -> Tensor | None:
    """Return 1 for every token that is a word, 0 for special tokens and padding, `[batch, tokens]`; None for images."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return mask
    words = ~torch.isin(ids, torch.tensor(sorted(special_ids), dtype=ids.dtype, device=ids.device))
    return words if mask is None or mask.shape != ids.shape else words & (mask > 0)


def special_ids_of(source: Any) -> frozenset[int]:
    """Return the ids of the tokens that stand for no word, as a tokenizer or a config names them."""
    found: set[Any] = set()
    for kind in ("bos", "eos", "cls", "sep", "pad"):
        value = getattr(source, f"{kind}_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(found - {None})
