"""The demo's models: a small Llama, a LoRA adapter on it, and the one loop that trains both."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from rapidin.demo.progress import Steps

if TYPE_CHECKING:
    from rich.console import Console

    from rapidin.encoding import Encoded

NOT_A_TARGET = -100


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


def add_lora(model: Any, *, rank: int = 8, seed: int = 0) -> Any:
    """The model with a LoRA adapter on every linear layer of its blocks; only the adapter trains."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def collate(examples: Sequence["Encoded"], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and labels, each [B, T] int64, padded on the right.

    labels hold NOT_A_TARGET at the tokens whose loss does not count.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, NOT_A_TARGET)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, :length] = ids[row, :length].where(torch.tensor(example.target), NOT_A_TARGET)
    return ids, mask, labels


def train(
    model: Any,
    examples: Sequence["Encoded"],
    *,
    pad: int,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    label: str,
    console: "Console",
) -> float:
    """AdamW on the completion tokens; the learning rate rises for a twentieth of the steps, then falls.

    Returns the mean loss of the last epoch. The same arguments give the same weights on one machine.
    """

    rng = random.Random(seed)
    order = list(range(len(examples)))
    steps = epochs * -(-len(examples) // batch)
    warmup = max(1, steps // 20)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    model.train()
    losses: list[float] = []
    with Steps(label, steps, console) as progress:
        for _ in range(epochs):
            rng.shuffle(order)
            losses.clear()
            for start in range(0, len(order), batch):
                ids, mask, labels = collate([examples[row] for row in order[start : start + batch]], pad)
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
                wanted = labels[:, 1:].flatten()
                loss = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=NOT_A_TARGET)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.step(losses[-1])
    model.eval()
    return sum(losses) / len(losses)


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], *, longest: int = 32) -> list[str]:
    """Greedy completions of `prompts`, together in one batch."""
    model.eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoded: list[str] = tokenizer.batch_decode(
        made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return decoded
