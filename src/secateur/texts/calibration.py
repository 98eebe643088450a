"""Calibration texts on their way to a model: as a list or one by one, in their order, tokenised into batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.errors import InvalidInputError, invalid
from secateur.models.inputs import ForwardArguments, max_length
from secateur.models.loading import load_tokenizer
from secateur.models.offload import device_of
from secateur.models.sentence_transformers import transformer_of
from secateur.models.state import base_of
from secateur.texts.data import StreamedBatches, Text, check_texts
from secateur.texts.stopping import Stop
from secateur.texts.streams import BatchStream


def texts_of(texts: Iterable[Text] | None) -> Iterable[Text] | None:
    """Return an array or a column of a table as a list, and other texts as they are.

    Raises `InvalidInputError` for a table or mapping as a whole, which would be read as the names of its columns.
    """
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise invalid("texts", "be one column of a table", type(texts).__name__, "such as table['sentence']")
    return list(texts) if hasattr(texts, "__array__") and isinstance(texts, Iterable) else texts


def as_list(texts: Iterable[Text] | None, may_come_one_by_one: bool) -> Sequence[Text] | None:
    """Return the texts where they are a sequence, or must become one; None where there are none or they may not."""
    if texts is None or isinstance(texts, Sequence):
        return texts
    if not isinstance(texts, Iterable):
        raise invalid("texts", "be strings or pairs of strings, in a list or one after the other", texts)
    return None if may_come_one_by_one else list(texts)


def reading_order(texts: Sequence[Text], stop: Stop, seed: int) -> list[int]:
    """Return which texts are scored, in which order: as given, or at random where they may not all be read."""
    check_texts(texts)
    if stop == "all":
        return list(range(len(texts)))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return order if stop == "auto" else order[:stop]


def by_length(texts: Sequence[Text]) -> list[Text]:
    """Return the texts from the longest to the shortest, in characters: what takes most memory comes first."""
    return sorted(texts, key=lambda text: len(text) if isinstance(text, str) else sum(map(len, text)), reverse=True)


def calibration_batches(
    model: nn.Module, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int
) -> StreamedBatches:
    """Return the texts' batches on the model's device, made anew at every reading.

    Raises `InvalidInputError` for a model that reads something else than texts.
    """
    check_reads_texts(model)
    device = device_of(base_of(model))
    return StreamedBatches(tokenizer, texts, batch_size, min(length, max_length(model, length)), device)


def stream_batches(
    model: nn.Module, texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int
) -> BatchStream:
    """Return batches, as the model takes them, of texts that come one after the other and are read once."""
    check_reads_texts(model)
    base = base_of(model)
    tokens = min(length, max_length(model, length))
    return BatchStream(tokenizer, texts, batch_size, tokens, device_of(base), ForwardArguments(base, []).of)


def check_reads_texts(model: nn.Module) -> None:
    """Raise `InvalidInputError` for a model whose base takes no token ids, such as one of images or speech."""
    base = base_of(model)
    if "input_ids" not in inspect.signature(base.forward).parameters:
        raise InvalidInputError(f"{type(base).__name__} takes `{base.main_input_name}` and no texts; give `inputs`")


def own_tokenizer(model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a SentenceTransformer, or of a model that was loaded by name."""
    inner = transformer_of(model)
    if inner is not model and isinstance(found := getattr(model, "tokenizer", None), PreTrainedTokenizerBase):
        return found
    name = getattr(inner, "name_or_path", "")
    if not name:
        raise InvalidInputError("`tokenizer` must be given for a model that was not loaded by name")
    return load_tokenizer(name)
