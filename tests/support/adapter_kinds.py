"""Every kind of adapter that peft makes for causal models, on a tiny Llama, as if it had been trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from causal_types import tiny_causal
from tiny import tiny_llama

_LINEAR = ["q_proj", "v_proj", "down_proj"]
_BIASES = {"attention_bias": True, "mlp_bias": True}
_TIED = {"tie_word_embeddings": True}


class Adapter:
    """An adapter's config by its name in peft, and its settings.

    on: settings of the Llama beneath, or the type of another model.
    """

    def __init__(self, config: str, *, on: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self.config, self.settings, self.on = config, settings, dict(on or {})


def _lora(*, on: Mapping[str, Any] | None = None, **settings: Any) -> Adapter:
    return Adapter("LoraConfig", on=on, **{"r": 4, "target_modules": _LINEAR, **settings})


KINDS: dict[str, Adapter] = {
    "LoRA": _lora(),
    "LoRA, all linear layers": _lora(target_modules="all-linear"),
    "LoRA, rank-stabilised": _lora(use_rslora=True),
    "LoRA, PiSSA": _lora(init_lora_weights="pissa"),
    "LoRA, dropout": _lora(lora_dropout=0.1),
    "LoRA, ranks by pattern": _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "LoRA, some layers": _lora(layers_to_transform=[1]),
    "LoRA, bias of its own": _lora(lora_bias=True, on=_BIASES),
    "LoRA, its layers' biases": _lora(bias="lora_only", on=_BIASES),
    "LoRA, all biases": _lora(bias="all", on=_BIASES),
    "LoRA, head saved": _lora(modules_to_save=["lm_head"]),
    "LoRA, tied head and embedding saved": _lora(modules_to_save=["lm_head", "embed_tokens"], on=_TIED),
    "LoRA, norms saved": _lora(modules_to_save=["input_layernorm"]),
    "LoRA, embedding": _lora(target_modules=["embed_tokens", "q_proj"]),
    "LoRA, head": _lora(target_modules=["lm_head", "q_proj"]),
    "LoRA, trained tokens": _lora(trainable_token_indices=[5, 7, 100]),
    "LoRA, trained tokens, tied": _lora(trainable_token_indices=[5, 7, 100], on=_TIED),
    "LoRA, routed experts": _lora(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        on={"type": "mixtral"},
    ),
    "LoRA, all linear layers, Mixtral": _lora(target_modules="all-linear", on={"type": "mixtral"}),
    "LoRA, all linear layers, Qwen3-Next": _lora(target_modules="all-linear", on={"type": "qwen3_next"}),
    "LoRA, GPT-2": _lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, on={"type": "gpt2"}),
    "LoRA, layers repeated": _lora(layer_replication=[[0, 2], [1, 2]]),
    "DoRA": _lora(use_dora=True),
    "DoRA, embedding": _lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "QALoRA": _lora(use_qalora=True, qalora_group_size=4),
    "aLoRA": _lora(alora_invocation_tokens=[5, 7]),
    "AdaLoRA": Adapter("AdaLoraConfig", init_r=4, target_r=2, total_step=10, target_modules=_LINEAR),
    "AdamSS": Adapter("AdamssConfig", r=4, num_subspaces=2, target_modules=_LINEAR),
    "Adaption prompt": Adapter("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
    "BEFT": Adapter("BeftConfig", target_modules=["v_proj"], on={"attention_bias": True}),
    "BOFT": Adapter("BOFTConfig", boft_block_size=4, target_modules=_LINEAR),
    "C3A": Adapter("C3AConfig", block_size=8, target_modules=["q_proj", "v_proj"]),
    "Cartridge": Adapter("CartridgeConfig", num_virtual_tokens=4),
    "CPT": Adapter(
        "CPTConfig", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1, 1, 1, 1], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "DeFT": Adapter("DeftConfig", r=4, target_modules=_LINEAR),
    "DeLoRA": Adapter("DeloraConfig", r=4, target_modules=_LINEAR),
    "FourierFT": Adapter("FourierFTConfig", n_frequency=20, target_modules=_LINEAR),
    "FRoD": Adapter("FrodConfig", target_modules=_LINEAR, progressbar=False),
    "GLoRA": Adapter("GloraConfig", r=4, target_modules=_LINEAR),
    "GraLoRA": Adapter("GraloraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "HiRA": Adapter("HiraConfig", r=4, target_modules=_LINEAR),
    "HRA": Adapter("HRAConfig", r=4, target_modules=_LINEAR),
    "IA3": Adapter("IA3Config", target_modules=_LINEAR, feedforward_modules=["down_proj"]),
    "Lily": Adapter("LilyConfig", r=4, target_modules=_LINEAR),
    "LN tuning": Adapter("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "LoHa": Adapter("LoHaConfig", r=4, target_modules=_LINEAR),
    "LoKr": Adapter("LoKrConfig", r=4, target_modules=_LINEAR),
    "MiSS": Adapter("MissConfig", r=4, target_modules=_LINEAR),
    "OFT": Adapter("OFTConfig", oft_block_size=8, target_modules=_LINEAR),
    "OSF": Adapter("OSFConfig", target_modules=_LINEAR, effective_rank=8),
    "PEANuT": Adapter("PeanutConfig", r=4, target_modules=_LINEAR),
    "Poly": Adapter("PolyConfig", r=4, target_modules=_LINEAR),
    "Prefix tuning": Adapter("PrefixTuningConfig", num_virtual_tokens=4),
    "Prefix tuning, projected": Adapter(
        "PrefixTuningConfig", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "Prompt tuning": Adapter("PromptTuningConfig", num_virtual_tokens=4),
    "P-tuning": Adapter("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
    "P-tuning, LSTM": Adapter(
        "PromptEncoderConfig",
        num_virtual_tokens=4,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
    ),
    "Multitask prompt tuning": Adapter("MultitaskPromptTuningConfig", num_virtual_tokens=4, num_tasks=2),
    "PSOFT": Adapter("PsoftConfig", r=4, target_modules=_LINEAR),
    "PVeRA": Adapter("PveraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "RandLoRA": Adapter("RandLoraConfig", r=4, randlora_alpha=4, target_modules=["q_proj", "o_proj"]),
    "RoAd": Adapter("RoadConfig", group_size=8, target_modules=["q_proj", "o_proj"]),
    "SHiRA": Adapter("ShiraConfig", r=4, target_modules=_LINEAR),
    "Supertuning": Adapter("SupertuningConfig", sparsity=0.9, target_modules=_LINEAR),
    "TinyLoRA": Adapter("TinyLoraConfig", u=8, target_modules=_LINEAR),
    "Trained tokens": Adapter("TrainableTokensConfig", token_indices=[5, 7, 100]),
    "UniLoRA": Adapter("UniLoraConfig", theta_d_length=16, target_modules=_LINEAR),
    "VB-LoRA": Adapter("VBLoRAConfig", num_vectors=16, vector_length=8, target_modules=_LINEAR),
    "VeRA": Adapter("VeraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "WaveFT": Adapter("WaveFTConfig", n_frequency=16, target_modules=_LINEAR),
}


def exists(kind: str) -> bool:
    """Whether the installed peft has a kind with these settings."""
    import peft

    adapter = KINDS[kind]
    config = getattr(peft, adapter.config, None)
    return config is not None and adapter.settings.keys() <= {f.name for f in fields(config)}


def tiny_adapter(kind: str) -> Any:
    """A tiny Llama with an adapter; nothing that is trained is at its start."""
    import peft

    adapter = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_causal(adapter.on["type"]) if "type" in adapter.on else tiny_llama(**adapter.on)
        config = getattr(peft, adapter.config)(task_type="CAUSAL_LM", **adapter.settings)
        tuned = peft.get_peft_model(model, config)
        for parameter in tuned.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return tuned.eval()
