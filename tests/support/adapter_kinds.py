"""Every kind of adapter that peft makes for causal models, on a tiny Llama, as if it had been trained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from causal_types import tiny_causal
from tiny import tiny_llama

_LINEAR = ["q_proj", "v_proj", "down_proj"]
_PROMPT = {"num_virtual_tokens": 4}

# The name of peft's config and its settings, and those of the Llama beneath or the type of another model.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "LoRA, all linear layers": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}, {}),
    "LoRA, rank-stabilised": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "use_rslora": True}, {}),
    "LoRA, PiSSA": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "init_lora_weights": "pissa"}, {}),
    "LoRA, dropout": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "lora_dropout": 0.1}, {}),
    "LoRA, ranks by pattern": (
        "LoraConfig",
        {"r": 4, "target_modules": _LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {},
    ),
    "LoRA, some layers": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "layers_to_transform": [1]}, {},
    ),
    "LoRA, bias of its own": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "lora_bias": True}, {"attention_bias": True, "mlp_bias": True},
    ),
    "LoRA, its layers' biases": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "bias": "lora_only"}, {"attention_bias": True, "mlp_bias": True},
    ),
    "LoRA, all biases": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "bias": "all"}, {"attention_bias": True, "mlp_bias": True},
    ),
    "LoRA, head saved": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "modules_to_save": ["lm_head"]}, {}),
    "LoRA, tied head and embedding saved": (
        "LoraConfig",
        {"r": 4, "target_modules": _LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
        {"tie_word_embeddings": True},
    ),
    "LoRA, norms saved": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "modules_to_save": ["input_layernorm"]}, {},
    ),
    "LoRA, embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, {}),
    "LoRA, head": ("LoraConfig", {"r": 4, "target_modules": ["lm_head", "q_proj"]}, {}),
    "LoRA, trained tokens": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "trainable_token_indices": [5, 7, 100]}, {},
    ),
    "LoRA, trained tokens, tied": (
        "LoraConfig",
        {"r": 4, "target_modules": _LINEAR, "trainable_token_indices": [5, 7, 100]},
        {"tie_word_embeddings": True},
    ),
    "LoRA, routed experts": (
        "LoraConfig",
        {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"type": "mixtral"},
    ),
    "LoRA, all linear layers, Mixtral": (
        "LoraConfig", {"r": 4, "target_modules": "all-linear"}, {"type": "mixtral"},
    ),
    "LoRA, all linear layers, Qwen3-Next": (
        "LoraConfig", {"r": 4, "target_modules": "all-linear"}, {"type": "qwen3_next"},
    ),
    "LoRA, GPT-2": (
        "LoraConfig", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, {"type": "gpt2"},
    ),
    "LoRA, layers repeated": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "layer_replication": [[0, 2], [1, 2]]}, {},
    ),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "use_dora": True}, {}),
    "DoRA, embedding": ("LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {}),
    "QALoRA": (
        "LoraConfig", {"r": 4, "target_modules": _LINEAR, "use_qalora": True, "qalora_group_size": 4}, {},
    ),
    "aLoRA": ("LoraConfig", {"r": 4, "target_modules": _LINEAR, "alora_invocation_tokens": [5, 7]}, {}),
    "AdaLoRA": (
        "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": _LINEAR}, {},
    ),
    "AdamSS": ("AdamssConfig", {"r": 4, "num_subspaces": 2, "target_modules": _LINEAR}, {}),
    "Adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}, {}),
    "BEFT": ("BeftConfig", {"target_modules": ["v_proj"]}, {"attention_bias": True}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, "target_modules": _LINEAR}, {}),
    "C3A": ("C3AConfig", {"block_size": 8, "target_modules": ["q_proj", "v_proj"]}, {}),
    "Cartridge": ("CartridgeConfig", {"num_virtual_tokens": 4}, {}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}, {}),
    "DeFT": ("DeftConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "DeLoRA": ("DeloraConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 20, "target_modules": _LINEAR}, {}),
    "FRoD": ("FrodConfig", {"target_modules": _LINEAR, "progressbar": False}, {}),
    "GLoRA": ("GloraConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}, {}),
    "HiRA": ("HiraConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "HRA": ("HRAConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "IA3": (
        "IA3Config", {"target_modules": _LINEAR, "feedforward_modules": ["down_proj"]}, {},
    ),
    "Lily": ("LilyConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}, {}),
    "LoHa": ("LoHaConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "LoKr": ("LoKrConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "MiSS": ("MissConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "target_modules": _LINEAR}, {}),
    "OSF": ("OSFConfig", {"target_modules": _LINEAR, "effective_rank": 8}, {}),
    "PEANuT": ("PeanutConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "Poly": ("PolyConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "Prefix tuning": ("PrefixTuningConfig", _PROMPT, {}),
    "Prefix tuning, projected": ("PrefixTuningConfig", {**_PROMPT, "prefix_projection": True, "encoder_hidden_size": 16}, {}),
    "Prompt tuning": ("PromptTuningConfig", _PROMPT, {}),
    "P-tuning": ("PromptEncoderConfig", {**_PROMPT, "encoder_hidden_size": 16}, {}),
    "P-tuning, LSTM": (
        "PromptEncoderConfig",
        {**_PROMPT, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
        {},
    ),
    "Multitask prompt tuning": ("MultitaskPromptTuningConfig", {**_PROMPT, "num_tasks": 2}, {}),
    "PSOFT": ("PsoftConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "PVeRA": ("PveraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}, {}),
    "RandLoRA": ("RandLoraConfig", {"r": 4, "randlora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}, {}),
    "RoAd": ("RoadConfig", {"group_size": 8, "target_modules": ["q_proj", "o_proj"]}, {}),
    "SHiRA": ("ShiraConfig", {"r": 4, "target_modules": _LINEAR}, {}),
    "Supertuning": ("SupertuningConfig", {"sparsity": 0.9, "target_modules": _LINEAR}, {}),
    "TinyLoRA": ("TinyLoraConfig", {"u": 8, "target_modules": _LINEAR}, {}),
    "Trained tokens": ("TrainableTokensConfig", {"token_indices": [5, 7, 100]}, {}),
    "UniLoRA": ("UniLoraConfig", {"theta_d_length": 16, "target_modules": _LINEAR}, {}),
    "VB-LoRA": (
        "VBLoRAConfig", {"num_vectors": 16, "vector_length": 8, "target_modules": _LINEAR}, {},
    ),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "o_proj"]}, {}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 16, "target_modules": _LINEAR}, {}),
}  # fmt: skip


def exists(kind: str) -> bool:
    """Whether the installed peft has a kind with these settings."""
    import peft

    name, settings, _ = KINDS[kind]
    return hasattr(peft, name) and settings.keys() <= {f.name for f in fields(getattr(peft, name))}


def tiny_adapter(kind: str, seed: int = 0) -> Any:
    """A tiny Llama with an adapter; nothing that is trained is at its start."""
    import peft

    name, settings, of_model = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_causal(of_model["type"], seed) if "type" in of_model else tiny_llama(seed, **of_model)
        tuned = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **settings))
        for parameter in tuned.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return tuned.eval()
