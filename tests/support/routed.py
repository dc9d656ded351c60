"""Tiny random models with routed experts or with weights that no linear module applies, by their type."""

from __future__ import annotations

from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_QWEN = {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 8}
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
    "norm_topk_prob": True, "head_dim": 8,
}  # fmt: skip
_DSA = {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
_MAMBA = {
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_MOE, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_moe": _QWEN,
    "qwen3_next": {
        **_QWEN, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DSA,
    "glm_moe_dsa": _DSA,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {
        **_MAMBA, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4, "use_mambapy": False},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4, "use_mambapy": False},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0,
        "moe_num_shared_experts": 1,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
    },
    "dbrx": {},
}  # fmt: skip


def tiny_routed(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of a type of `SETTINGS`, with random weights that are large enough for gradients to differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if kind == "dbrx":
        settings: dict[str, Any] = {
            "vocab_size": 320, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        }  # fmt: skip
    else:
        settings = {**_COMMON, **SETTINGS[kind], **changes}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    return model.eval()


class LinearExperts(torch.nn.Module):
    """Experts of linear layers, each called with the tokens that are routed to it.

    kind: "gathered" tokens of each expert, or all tokens "sorted" by expert, as two kinds of code have it.
    """

    def __init__(self, kind: str, hidden: int = 32, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.kind, self.top_k = kind, top_k
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "up": torch.nn.Linear(hidden, 24),
                    "gate": torch.nn.Linear(hidden, 24, bias=False),
                    "down": torch.nn.Linear(24, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = torch.softmax(self.router(flat), -1).topk(self.top_k, -1)
        mixed = self._gathered if self.kind == "gathered" else self._sorted
        return mixed(flat, weights, chosen).view(x.shape)

    def _expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        expert: Any = self.experts[number]
        output: torch.Tensor = expert["down"](torch.nn.functional.silu(expert["gate"](x)) * expert["up"](x))
        return output

    def _gathered(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(flat)
        for number in range(len(self.experts)):
            token, place = torch.where(chosen == number)
            seen = flat[None, token].reshape(-1, flat.shape[1])
            total.index_add_(0, token, self._expert(number, seen) * weights[token, place, None])
        return total

    def _sorted(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        order = chosen.view(-1).argsort(stable=True)
        seen, first, outputs = flat[order // self.top_k], 0, []
        for number, count in enumerate(torch.bincount(chosen.view(-1), minlength=len(self.experts)).tolist()):
            if count:
                outputs.append(self._expert(number, seen[first : first + count]))
            first += count
        back = torch.empty_like(seen)
        back[order] = torch.cat(outputs)
        return (back.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def with_linear_experts(kind: str) -> Any:
    """A tiny Mixtral whose experts are linear layers."""
    model = tiny_routed("mixtral")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = LinearExperts(kind)
    return model
