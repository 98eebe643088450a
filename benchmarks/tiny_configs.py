"""A tiny config for any model type of transformers, by the names of the settings that its config has.

No table of models: `hidden_size` means the same in all of them. Where the tiny config does not build, `candidate`
offers ever more cautious ones, by number.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, VOCABULARY = 32, 4, 2, 2, 120

_WIDTHS = """hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim embedding_size decoder_hidden_size
    projection_dim encoder_hidden_size n_embed word_embed_proj_dim hidden_channels cross_attention_hidden_size
    qk_latents_channels d_latents decoder_d_model encoder_d_model output_dim text_embed_dim vision_hidden_size
    output_hidden_size mask_feature_size feature_size fpn_hidden_dim conv_dim backbone_hidden_size
    cross_attention_dim token_dim out_hidden_size prompt_encoder_hidden_size decoder_hidden_dim
    projector_hidden_size audio_embed_dim inner_dim_size backbone_embed_dim"""
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads attention_heads decoder_num_attention_heads
    num_self_attention_heads num_cross_attention_heads encoder_num_attention_heads decoder_n_heads
    vision_num_heads attention_num_heads"""
_LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers depth decoder_num_hidden_layers num_self_attends_per_block decoder_depth
    encoder_num_hidden_layers vision_layers num_conformer_blocks perceiver_num_layers num_single_layers"""
_INNER = """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim hidden_dim_ff d_ff n_inner mlp_hidden_size
    hidden_dim d_inner moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size dim_feedforward
    decoder_intermediate_size encoder_intermediate_size shared_intermediate_size mlp_dim expert_ffn_hidden_size"""

SETTINGS: dict[str, Any] = {
    **dict.fromkeys(_INNER.split(), 2 * WIDTH),
    **dict.fromkeys(_WIDTHS.split(), WIDTH),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_LAYERS.split(), LAYERS),
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_kv_heads": KEY_VALUE_HEADS,
    "n_kv_heads": KEY_VALUE_HEADS,
    "encoder_num_key_value_heads": KEY_VALUE_HEADS,
    "decoder_num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": WIDTH // HEADS,
    "d_kv": WIDTH // HEADS,
    "attention_head_size": WIDTH // HEADS,
    "kv_channels": WIDTH // HEADS,
    "global_head_dim": WIDTH // HEADS,
    # Multi-head latent attention and rotary parts.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "rotary_dim": 8,
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # Vocabularies and lengths.
    "vocab_size": VOCABULARY,
    "src_vocab_size": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "sliding_window": 8,
    "attention_window": 4,
    "image_size": 32,
    "num_mel_bins": 80,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # State-space and linear-attention parts.
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": WIDTH,
    # Pictures and sounds.
    "num_queries": 10,
    "num_feature_levels": 3,
    "num_query_tokens": 4,
    "num_latents": 4,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_LISTS = {
    **dict.fromkeys(["hidden_sizes", "embed_dims", "decoder_hidden_sizes", "neck_hidden_sizes"], WIDTH),
    **dict.fromkeys(["num_attention_heads", "num_heads", "heads"], HEADS),
    **dict.fromkeys(["depths"], 1),
    **dict.fromkeys(["conv_dim", "tdnn_dim"], WIDTH),
}
_OFTEN_NONE = ("hidden_size", "d_model", "n_embd", "vocab_size", "head_dim")
_CAUTIOUS = ("num_key_value_heads", "head_dim", "image_size", "kv_channels", "num_kv_heads")


CANDIDATES = 6


def candidate(config_class: type[PreTrainedConfig], number: int) -> PreTrainedConfig:
    """Return the config of this number, from 0 (everything tiny) to 5 (few layers, all else as it comes)."""
    if number == 0:
        settings = SETTINGS
    elif number == 1:
        settings = {k: v for k, v in SETTINGS.items() if k != "image_size"}
    elif number == 2:
        settings = {k: v for k, v in SETTINGS.items() if k not in _CAUTIOUS}
    elif number in (3, 4):  # rotary embeddings in sections want heads of 64 or 128
        width = 256 if number == 3 else 512
        wide = {**dict.fromkeys(_WIDTHS.split(), width), **dict.fromkeys(_INNER.split(), 256)}
        settings = {**SETTINGS, **wide, "head_dim": width // HEADS}
    else:
        settings = {k: SETTINGS[k] for k in _LAYERS.split()}
    return _tiny(config_class, settings)


def _tiny(config_class: type[PreTrainedConfig], settings: dict[str, Any]) -> PreTrainedConfig:
    changes: dict[str, Any] = {}
    renamed = dict(config_class.attribute_map or {})
    known = _defaults(config_class)
    tokens = 3
    for name, default in known.items():
        if name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
            changes[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 2)
        elif name.endswith(("_token_id", "_token_index", "_tokenid")) and isinstance(default, int):
            changes[name], tokens = tokens, tokens + 1
        elif isinstance(default, list | tuple) and name in _LISTS and default and isinstance(default[0], int):
            changes[name] = type(default)([_LISTS[name]] * len(default))
        elif not isinstance(default, bool) and isinstance(default, int | type(None)):
            known_here = name in known and (default is not None or name in (*_OFTEN_NONE, "num_key_value_heads"))
            known_elsewhere = name in renamed and renamed[name] not in known
            if name in settings and (known_here or known_elsewhere):
                changes[name] = settings[name]
    if "kv_lora_rank" in known and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]  # latent attention shares no heads
    if "layer_types" in known and "num_hidden_layers" in changes:
        changes |= _one_of_each_kind(config_class)
    if config_class.sub_configs:
        filled = config_class()
        for name in config_class.sub_configs:
            part = getattr(filled, name, None)
            if isinstance(part, PreTrainedConfig):
                changes[name] = _tiny(type(part), settings)
    return config_class(**changes)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the settings that a config class takes, with their defaults."""
    if is_dataclass(config_class):
        return {field.name: field.default for field in fields(config_class)}
    # Configs of the first releases of transformers 5 are plain classes.
    taken = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def _one_of_each_kind(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return settings with a layer of each kind that the full model mixes, attention among them."""
    try:
        kinds = list(dict.fromkeys(config_class().layer_types or []))
    except Exception:
        return {}
    if len(kinds) < 2:
        return {}
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}
