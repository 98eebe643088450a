"""Texts on their way to a model: what a text is, and tokenised batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from secateur.errors import invalid
from secateur.support.checks import check_tokenizer, check_whole
from secateur.support.interrupts import undoing
from secateur.texts.whole_tables import how_to_choose_of_rows

Text: TypeAlias = str | tuple[str, str]


def check_texts(texts: Sequence[Text]) -> None:
    """Raise `InvalidInputError` unless `texts` is a sequence of only strings or only pairs of strings, not empty."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise invalid("texts", "be a list of strings or of pairs of strings", texts)
    if not texts:
        raise invalid("texts", "hold at least one text", texts)
    for index, text in enumerate(texts):
        is_pair = isinstance(text, tuple) and len(text) == 2 and all(map(is_text, text))
        if not is_text(text) and not is_pair:
            rule = "be a string or a tuple of two strings, without lone surrogates"
            raise invalid(f"texts[{index}]", rule, text, how_to_choose_of_rows(text))
        if isinstance(text, str) != isinstance(texts[0], str):
            raise invalid(f"texts[{index}]", "be of the kind of the first text: all single or all pairs", text)


def is_text(value: Any) -> bool:
    """Is it a string that UTF-8 can write, as tokenizers take it?"""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode("utf-8")))
    except UnicodeEncodeError:
        return False


def tokenize(tokenizer: Any, texts: Sequence[Text], max_length: int = 128) -> Any:
    """Return the tokenizer's `BatchEncoding` of `texts`: a list for each text, truncated and not padded.

    A text keeps at most `max_length` tokens, or the tokenizer's own limit if that is lower. Where a tokenizer makes
    nothing of a text, as some do of an empty one, it gets one token of padding: no model takes a batch without a token.

    Raises `InvalidInputError` for texts that `check_texts` refuses, for `max_length` below 4, and for a text without a
    token where the tokenizer has none to pad with.
    """
    check_texts(texts)
    check_tokenizer(tokenizer)
    check_whole("max_length", max_length, 4)
    made = _encode(tokenizer, texts, max_length)
    empty = [number for number, ids in enumerate(made["input_ids"]) if not ids]
    if empty:
        with padding_token(tokenizer):
            padded = _encode(tokenizer, texts[empty[0] : empty[0] + 1], 1, padding="max_length")
        for name, rows in padded.items():
            for number in empty:
                made[name][number] = list(rows[0])
    return made


@undoing
def padding_token(tokenizer: Any) -> Iterator[None]:
    """Let a tokenizer without a padding token pad with its end-of-sequence token until the block ends.

    Raises `InvalidInputError` where it has neither token.
    """
    if tokenizer.pad_token is not None:
        yield
        return
    if tokenizer.eos_token is None:
        raise invalid("tokenizer", "have a padding or an end-of-sequence token", type(tokenizer).__name__)
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None


def _encode(tokenizer: Any, texts: Sequence[Text], max_length: int, **options: Any) -> Any:
    is_pair = isinstance(texts[0], tuple)
    return tokenizer(
        [text[0] if is_pair else text for text in texts],
        [text[1] for text in texts] if is_pair else None,
        truncation=True,
        max_length=min(max_length, tokenizer.model_max_length),
        **options,
    )


def padded(
    tokenizer: Any, rows: Sequence[dict[str, list[int]]], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return one batch of texts that `tokenize` has made tokens of: int64 tensors `[batch, tokens of the longest]`."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    with padding_token(tokenizer):
        made = pad_without_fast_tokenizer_warning(tokenizer, columns, padding="longest", return_tensors="pt")
    return dict(made.to(device))


def rows_of(encoding: Any) -> list[dict[str, list[int]]]:
    """Return what `tokenize` made of each text, text by text."""
    return [{name: values[i] for name, values in encoding.items()} for i in range(len(encoding["input_ids"]))]


def batches(
    tokenizer: Any,
    texts: Sequence[Text],
    batch_size: int = 32,
    max_length: int = 128,
    device: str | torch.device = "cpu",
) -> list[dict[str, Tensor]]:
    """Return the model's inputs for `texts` in the order given: dictionaries of int64 tensors `[batch, tokens]`.

    Every batch is padded to its longest text. A tokenizer without a padding token pads with its end-of-sequence token
    and comes back as it was.

    Raises `InvalidInputError` for what `tokenize` refuses, for `batch_size` below 1, and for a tokenizer with neither
    token.
    """
    check_whole("batch_size", batch_size)
    rows = rows_of(tokenize(tokenizer, texts, max_length))
    return [padded(tokenizer, rows[i : i + batch_size], device) for i in range(0, len(rows), batch_size)]
