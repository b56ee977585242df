"""Small configurations of every causal LM in transformers, each layer kind of a family included."""

from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


VOCAB_SIZE, CONTEXT_LENGTH = 96, 128
WINDOW = 7  # shorter than most prompts, so that rows run out of it
# Names that mean the same in most families. Layers are as many as show each kind twice; heads are grouped where they
# can be; a head is not `hidden_size / num_attention_heads` wide where the family leaves that open.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": False,  # a tied head mostly repeats the last token
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    # Other names of sizes
    "embedding_size": 64,
    "input_embedding_size": 64,
    "output_embedding_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_hidden_size": 96,
    "dff": 96,
    "dim_ff": 96,
    "d_inner": 96,
    "d_head": 16,
    "dim_head": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": CONTEXT_LENGTH,
    "n_ctx": CONTEXT_LENGTH,
    "model_max_length": CONTEXT_LENGTH,
    "rotary_dim": 8,
    "kv_channels": 16,
    # Windows
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": 8,
    # Experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "prefix_dense_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 2,
    "num_nextn_predict_layers": 0,
    # Latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    # Recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_headdim": 32,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 8,
    "n_groups": 1,
    "lru_width": 64,
    "attention_hidden_size": 64,
    "context_length": CONTEXT_LENGTH,
    # Embeddings of layers, towers
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "patch_size": 4,
    "image_size": 16,
    "num_channels": 3,
}
DEFAULT: Any = object()  # leaves a field as the family has it
LATENT = {"num_key_value_heads": 4, "head_dim": DEFAULT, "n_shared_experts": 1}
HYBRID = ["linear_attention", "full_attention"] * 2
# What the table above leaves wrong or too large, and layer kinds that a family has but does not show by default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 8, "num_expert_group": 2, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2, "hidden_size": 64},
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": [96] * 4},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4": {"vision_config": {"position_embedding_size": 16}},
    "dots3_note": {"vision_config": {"adapter_in_dim": 64}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 32,
        "head_dim": 24,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4_moe": {"num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "num_layers": 4},
    "granitemoehybrid": {"layer_types": HYBRID, "mamba_expand": 2},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 16},
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "rel_extent": 16,
        "unpadded_vocab_size": 96,
    },
    "helium": {"head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "zamba": {"num_key_value_heads": 4, "head_dim": DEFAULT, "attention_hidden_size": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "num_buckets": 4},
    "roc_bert": {
        "shape_vocab_size": 16,
        "pronunciation_vocab_size": 16,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "floor_scale": 8},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}


def small_config(family: str) -> PretrainedConfig:
    """The family's configuration with every size small."""
    return _small(CONFIG_MAPPING[family], OVERRIDES.get(family, {}))


def _small(kind: Any, overrides: dict[str, Any]) -> PretrainedConfig:
    known = {field.name for field in fields(kind)} | set(kind.attribute_map)
    try:
        default = kind()
    except (ValueError, TypeError):  # some have none
        default = None
    values = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:
        values |= LATENT
    for name in kind.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PretrainedConfig):
            values[name] = _small(type(sub), OVERRIDES.get(sub.model_type, {}) | overrides.get(name, {})).to_dict()
    values |= {name: value for name, value in overrides.items() if name not in kind.sub_configs}
    values = _layer_kinds(default, {field.name for field in fields(kind)}, values.get("num_hidden_layers", 0)) | values
    return kind(**{name: value for name, value in values.items() if value is not DEFAULT})


def _layer_kinds(default: PretrainedConfig | None, known: set[str], num_layers: int) -> dict[str, list[str]]:
    """Lists with an entry per layer: all kinds of the default configuration, in their order, over and over."""
    lists = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        kinds: list[str] = list(dict.fromkeys(getattr(default, name, None) or ()))
        if name not in known or not kinds:
            continue
        if kinds == ["full_attention"] and "sliding_window" in known:
            kinds.insert(0, "sliding_attention")
        lists[name] = [kinds[i % len(kinds)] for i in range(num_layers)]
    return lists
