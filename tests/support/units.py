"""Masks of neurons and layers for tiny models, and models that the table in tiny.py does not have."""

import torch
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Qwen3Config,
    T5Config,
)

from secateur.units.masks import Mask
from tests.support.tiny import CONFIGS, _stirred, tiny_model

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 37, "vocab_size": 99, **_HEADS}

MORE = {
    "wide bert": lambda: BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, vocab_size=99
    ),
    "wide llama": lambda: LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8, intermediate_size=256,
        vocab_size=99,
    ),
    "wide t5": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    ),
    "gated t5": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=3, num_heads=4, vocab_size=99, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gemma": lambda: GemmaConfig(**_SIZES),
    "gemma2": lambda: Gemma2Config(**{**_SIZES, "num_hidden_layers": 4}, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 4}, sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip


def model_of(config):
    torch.manual_seed(0)
    return _stirred(AutoModel.from_config(config))


def small_model(kind):
    """A tiny model of either table."""
    return tiny_model(kind) if kind in CONFIGS else model_of(MORE[kind]())


def even_mask(sites):
    """The same units go at every site of a kind: a third of the neurons, two heads or one group, the middle layer."""
    rows = {}
    for name, site in sites.items():
        kept = torch.ones(site.num_units, dtype=torch.bool)
        if site.kind == "heads":
            kept[: max(2, site.group_size)] = False
        elif site.kind == "neurons":
            kept[::3] = False
        else:
            kept[site.num_units // 2] = False
        rows[name] = kept
    return Mask(rows)


def ragged_mask(sites):
    """Another number of units goes at every site: neurons and heads; the first layer of every list, where there is more
    than one.
    """
    rows = {}
    for number, (name, site) in enumerate(sites.items()):
        kept = torch.ones(site.num_units, dtype=torch.bool)
        if site.kind == "layers":
            kept[0] = site.num_units == 1
        elif site.group_size > 1:
            kept[: site.group_size] = number % 2 == 0
        else:
            kept[1 : 2 + number % 3] = False
        rows[name] = kept
    return Mask(rows)
