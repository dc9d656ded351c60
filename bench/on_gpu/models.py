"""Llamas with random weights, and texts for them, without any download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rapidin.gradients.model import LoadedModel
from rapidin.gradients.path import WeightPath

RANK = 16
KINDS = ("linear layers", "LoRA")


class LoRA(nn.Module):
    """A linear layer with a trained product of rank RANK beside it, as in peft, for machines without peft."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Linear(layer.in_features, RANK, bias=False, **like)
        self.lora_B = nn.Linear(RANK, layer.out_features, bias=False, **like)
        nn.init.normal_(self.lora_B.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))
        return y


def make_tokenizer(vocabulary: int) -> Any:
    """A tokenizer in which each word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0} | {f"w{n}": n for n in range(1, vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", model_max_length=4096
    )


def make_model(size: dict[str, Any], kind: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """size: hidden, inner, layers, heads, kv_heads, vocabulary; kind: one of KINDS, what of it counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=size.get("spread", 0.03),
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokenizer = make_tokenizer(size["vocabulary"])
    if kind != "LoRA":
        return LoadedModel.of(model, tokenizer)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    named = dict(model.named_parameters())
    ends = [(p, None, p.data) for name, p in named.items() if ".lora_B." in name]
    return LoadedModel(model, tokenizer, WeightPath(ends), [name for name in named if ".lora_" in name])


def make_records(size: dict[str, Any], seed: int = 2) -> list[dict[str, str]]:
    """size: examples, of words (from, to) each, of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    low, high = size["words"]
    lengths = torch.randint(low, high, (size["examples"],), generator=generator).tolist()
    records = []
    for n in lengths:
        words = [f"w{i}" for i in torch.randint(1, size["vocabulary"], (n,), generator=generator).tolist()]
        records.append({"prompt": " ".join(words[: n // 2]), "completion": " ".join(["", *words[n // 2 :]])})
    return records
