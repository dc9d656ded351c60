"""The demo's model, a small Llama, and its answers; `rapidin.evaluate.training` trains it."""

from collections.abc import Sequence
from typing import Any

import torch


def small_llama(tokenizer: Any, *, hidden: int = 128, layers: int = 2, seed: int = 0) -> Any:
    """An untrained LlamaForCausalLM in float32 with the tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], *, longest: int = 32) -> list[str]:
    """Greedy completions of `prompts`, in one batch."""
    model.eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoded: list[str] = tokenizer.batch_decode(
        generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return decoded
