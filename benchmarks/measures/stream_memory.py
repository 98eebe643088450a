"""Memory of scoring against the number of texts: streamed from a file, and read into a list first.

A BERT of 2 layers x 4 heads, 64 wide, with random weights, so that texts are what memory is spent on, and sentences of
about 100 words drawn from a few hundred, one object a line in a file. Each count of texts and way runs in a process of
its own, which reports its peak resident memory after two batches of warming up and at the end; scorer `contribution`.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from benchmarks.runs import Run, alone, memory_mb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import secateur
from secateur.texts.data import load_task
from secateur.texts.streams import stream_texts

COUNTS = (1_000, 4_000, 16_000)
WORDS = [
    a + b for a, b in itertools.product(["ka", "lo", "mi", "ne", "ru", "sa", "ti", "vo"] * 4, ["x", "l", "m", "n"])
]


def write_texts(file: Path, count: int) -> None:
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(count):
            out.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(60, 140)))}) + "\n")


def model_and_tokenizer() -> tuple[BertModel, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    ids = {word: number for number, word in enumerate(dict.fromkeys([*special, *WORDS]))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(ids), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertModel(config).eval(), tokenizer


def score(way: str, file: str) -> dict[str, float]:
    model, tokenizer = model_and_tokenizer()
    secateur.score(model, ["ka lo " * 64] * 64, tokenizer=tokenizer)
    before = memory_mb()
    texts = stream_texts(file) if way == "streamed" else load_task(file).texts
    scores = secateur.score(model, texts, tokenizer=tokenizer)
    return {"texts": scores.num_texts, "before_mb": before, "after_mb": memory_mb()}


def measure(run: Run) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            file = Path(folder) / f"{count}.jsonl"
            write_texts(file, count)
            for way in ("streamed", "list"):
                row = {"way": way, "file_mb": file.stat().st_size / 2**20, **alone(__name__, way, str(file))}
                row["grown_mb"] = row["after_mb"] - row["before_mb"]
                rows.append(row)
                print(
                    f"{way:9s} {row['texts']:6d} texts, file {row['file_mb']:5.1f} MB: {row['grown_mb']:6.1f} MB more"
                )
    run.write(seed=0, rows=rows)


if __name__ == "__main__":
    print(json.dumps(score(*sys.argv[1:])))
