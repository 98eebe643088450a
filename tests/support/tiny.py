"""Tiny random models of many kinds, built from configs, and masks that cut them unevenly."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3NextConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    XGLMConfig,
)

from secateur.units.masks import Mask

_COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
_TEXT = {**_COMMON, "vocab_size": 99}

CONFIGS = {
    "bert": lambda: BertConfig(**_TEXT),
    "roberta": lambda: RobertaConfig(**_TEXT),
    "distilbert": lambda: DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=37),
    "electra": lambda: ElectraConfig(**_TEXT, embedding_size=16),
    "albert": lambda: AlbertConfig(**_TEXT, embedding_size=16),
    "vit": lambda: ViTConfig(**_COMMON, image_size=16, patch_size=4),
    "modernbert": lambda: ModernBertConfig(
        **_TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=1),
    "llama": lambda: LlamaConfig(**{**_TEXT, "num_attention_heads": 8}, num_key_value_heads=4),
    "qwen2": lambda: Qwen2Config(**{**_TEXT, "num_attention_heads": 8}, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**_TEXT),
    "opt": lambda: OPTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=37, vocab_size=99, word_embed_proj_dim=32
    ),
    "bart": lambda: BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99,
    ),
    # One bias, made by the first layer, for all of them; self- and cross-attention.
    "t5": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    ),
    "phi3": lambda: Phi3Config(
        **{**_TEXT, "num_attention_heads": 8}, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "qwen3_next": lambda: Qwen3NextConfig(  # a gate before the output projection
        **{**_TEXT, "num_attention_heads": 8}, num_key_value_heads=4, head_dim=8, layer_types=["full_attention"] * 3,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    ),
    # The next ones compute their attention themselves, past transformers' attention interface.
    "mpnet": lambda: MPNetConfig(**_TEXT),
    "deberta-v2": lambda: DebertaV2Config(
        **_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False
    ),
    "falcon": lambda: FalconConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=99, multi_query=False,
        bos_token_id=1, eos_token_id=2,
    ),
    "bloom": lambda: BloomConfig(
        hidden_size=32, n_layer=3, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=3
    ),
    "xglm": lambda: XGLMConfig(d_model=32, num_layers=3, attention_heads=4, ffn_dim=37, vocab_size=99),
}  # fmt: skip

LAYERS = {
    "bert": "encoder.layer", "llama": "layers", "gpt2": "h", "t5": "encoder.block", "opt": "decoder.layers",
    "vit": "layers", "bloom": "h", "mpnet": "encoder.layer",
}  # fmt: skip
"""Where some kinds have their layers."""

ADAPTED = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
"""What an adapter is put around in some kinds."""


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Build a model whose weights are large enough that every head matters."""
    torch.manual_seed(seed)
    return _stirred(AutoModel.from_config(CONFIGS[kind]()))


def tiny_classifier(kind: str, num_labels: int = 3, seed: int = 0) -> PreTrainedModel:
    """Build a classification model of the same kind."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.num_labels = num_labels
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # decoders classify at the last token that is no padding
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    return _stirred(auto.from_config(config))


def _stirred(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def uneven_mask(sites, empty: bool = False) -> Mask:
    """Drop another number of heads at each site; grouped ones by their rule. `empty` leaves the second site bare."""
    vectors = {}
    for number, (name, site) in enumerate(sites.items()):
        kept = torch.ones(site.num_units, dtype=torch.bool)
        if number == 1 and empty:
            kept[:] = False
        elif site.group_size > 1:
            if number % 2:
                kept[:: site.group_size] = False  # one query head of every group
            else:
                kept[: site.group_size] = False  # the first group whole
        elif number % 3 == 0:
            kept[1] = False
        elif number % 3 == 2:
            kept[[0, 3]] = False
        vectors[name] = kept
    return Mask(vectors)


WORDS = ["good", "bad", "film", "plot", "actor", "scene", "music", "story", "end", "start", "red", "blue"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows a dozen words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tiny_texts(count: int, seed: int = 0, pairs: bool = False) -> list:
    """Random sentences of those words, or pairs of them."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))

    return [(sentence(), sentence()) if pairs else sentence() for _ in range(count)]


def decoder_tokenizer(**tokens):
    """A tokenizer of single words as decoders have them: no padding token."""
    inner = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "good": 2, "bad": 3, "film": 4}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
