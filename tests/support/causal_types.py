"""Tiny random models of the causal types of transformers, of some ten thousand parameters each."""

from __future__ import annotations

from typing import Any

import torch
from tiny import CONTEXT, VOCABULARY

# What most configs call the same. A config takes those of these that it has.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "dff"], 48),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"], CONTEXT
    ),
    **dict.fromkeys(["initializer_range", "init_std"], 0.15),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "head_dim": 8,
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk"], 2),
    "layer_types": None,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
}
# With eight heads no two tokens have the same score, zero, of which a batch would keep another.
_INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 8}
_STATE_SPACE: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_DECODER: dict[str, Any] = {
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "is_decoder": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
}
_MAMBA_1 = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
]

# The settings of each type besides `_COMMON`; after a comma comes what it is used as.
TYPES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "axk1": _LATENT,
    "axk2": _LATENT | _INDEXER,
    "bailing_hybrid": _LATENT
    | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": _STATE_SPACE | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": _SLIDING,
    "cohere2_moe": {},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "ctrl": {},
    "cwm": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT | {"first_k_dense_replace": 1},
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 1, "n_group": 2},
    "deepseek_v32": _LATENT | _INDEXER | {"first_k_dense_replace": 1},
    "deepseek_v4": _INDEXER
    | {
        "q_lora_rank": 16,
        "o_lora_rank": 16,
        "o_groups": 2,
        "num_key_value_heads": 1,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "diffllama": {},
    "doge": {},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {},
    "falcon_h1": _STATE_SPACE | {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": {},
    "fuyu": {
        "text_config": {
            "model_type": "persimmon",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.15,
        }
    },
    "gemma": {},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": _SLIDING
    | {
        "intermediate_size": [48, 48],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": _SLIDING
    | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "per_layer_config": None},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | _INDEXER | {"mlp_layer_types": ["dense", "sparse"]},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": _STATE_SPACE
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": _LATENT | _INDEXER,
    "hyperclovax": {},
    "inkling_text": {"n_shared_experts": 1, "d_rel": 4, "rel_extent": 16},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": _MAMBA_1 | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {},
    "kimi_linear": _LATENT
    | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "kolibri1": {},
    "laguna": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {},
    "longcat_flash": _LATENT | {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "state_size": 8, "chunk_size": 16, "n_groups": 2},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": _LATENT,
    "minimax": {},
    "minimax_m2": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "moshi": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "n_groups": 2,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_moe": {},
    "qwen3_next": _DELTA,
    "recurrent_gemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "rwkv": {"use_cache": False},  # its state is changed in place, which leaves no gradient
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlnet": {"d_inner": 48},
    "youtu": _LATENT,
    "zamba": _MAMBA_1
    | {
        "num_hidden_layers": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
        "layers_block_type": ["mamba", "hybrid"],
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "trocr",
        ],
        _DECODER,
    ),
    # Encoders that may be decoders: as these they look at earlier tokens alone.
    **{f"{kind}, decoder": {"is_decoder": True} for kind in _ENCODERS},
    **{f"{kind}, encoder": {} for kind in _ENCODERS},
}


def exists(kind: str) -> bool:
    """Whether the installed transformers has a type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return kind.partition(",")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tiny_config(kind: str, **changes: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    of_kind = CONFIG_MAPPING[kind.partition(",")[0]]
    known = set(of_kind().to_dict()) | set(getattr(of_kind, "attribute_map", {})) - {"layer_types"}
    return of_kind(
        **{name: value for name, value in _COMMON.items() if name in known} | TYPES[kind] | changes
    )


def tiny_causal(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a type; nothing in it is constant. changes: of its settings."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()
        for parameter in model.parameters():
            if parameter.ndim < 2 or not bool(parameter.any()):
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model
