"""Tiny models, tokenizers and data made on the spot: seeded, no download, gradients that are not tiny."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
CONTEXT = 128

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Give three tips for staying healthy.",
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "Howdy! What is the capital of France? The capital of France is Paris.",
    "One, two, three, four, five, six, seven.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written and read back. bos: it puts <s> in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, which would hide mistakes
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama: 2 layers, 32 wide, 4 heads of which 2 for keys and values."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return _seeded(LlamaForCausalLM, LlamaConfig(**settings | config), seed)


def tiny_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A random GPT-2: Conv1D weights, biases, learnt positions, tied embeddings, dropout where it is on."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return _seeded(GPT2LMHeadModel, GPT2Config(**settings | config), seed)


def tiny_lora(model: PreTrainedModel, seed: int = 1, **config: Any) -> Any:
    """The model with a LoRA adapter as if it had been trained: lora_B is not zero."""
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if isinstance(model, GPT2LMHeadModel) else ["q_proj", "v_proj"]
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "target_modules": targets,
        "fan_in_fan_out": isinstance(model, GPT2LMHeadModel),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(model, LoraConfig(**settings | config))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return tuned.eval()


class Saved(NamedTuple):
    model: Path
    adapter: Path | None


def save_tiny(
    folder: Path, *, lora: bool = False, chat: bool = False, bos: bool = False, seed: int = 0, **config: Any
) -> Saved:
    """A tiny Llama with its tokenizer in folder/model and, with `lora`, an adapter in folder/adapter."""
    model = tiny_llama(seed, **config)
    model.save_pretrained(folder / "model")
    tiny_tokenizer(chat, bos).save_pretrained(folder / "model")
    if not lora:
        return Saved(folder / "model", None)
    model.name_or_path = str(folder / "model")
    tiny_lora(model, seed + 1).save_pretrained(folder / "adapter")
    return Saved(folder / "model", folder / "adapter")


WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "quick",
    "brown",
    "fox",
    "lazy",
    "dog",
    "Paris",
    "France",
    "capital",
    "staying",
    "healthy",
    "tips",
]


def records(n: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def some() -> str:
        count = int(torch.randint(1, 8, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator))

    return [{"prompt": f"{some()}: ", "completion": some()} for _ in range(n)]
