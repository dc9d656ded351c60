"""Tiny models of other tasks than the next token, made on the spot, with tokenizers of words."""

from __future__ import annotations

from typing import Any

import torch
from tiny import WORDS, _seeded
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that writes <s> before and </s> after a text, and between two."""
    vocabulary = {word: n for n, word in enumerate([*_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
    )


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(_SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def tiny_bert(seed: int = 0, **config: Any) -> BertForSequenceClassification:
    return _seeded(BertForSequenceClassification, BertConfig(**_sizes(**config)), seed)


def tiny_llama_classifier(seed: int = 0, **config: Any) -> LlamaForSequenceClassification:
    return _seeded(LlamaForSequenceClassification, LlamaConfig(**_sizes(**config)), seed)


def tiny_masked_bert(seed: int = 0, **config: Any) -> BertForMaskedLM:
    return _seeded(BertForMaskedLM, BertConfig(**_sizes(**config)), seed)


def tiny_masked_roberta(seed: int = 0, **config: Any) -> RobertaForMaskedLM:
    return _seeded(RobertaForMaskedLM, RobertaConfig(**_sizes(**config)), seed)


def tiny_t5(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    settings = {
        "vocab_size": len(_SPECIAL) + len(WORDS),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    return _seeded(T5ForConditionalGeneration, T5Config(**settings | config), seed)


def tiny_bart(seed: int = 0, **config: Any) -> BartForConditionalGeneration:
    settings = {
        "vocab_size": len(_SPECIAL) + len(WORDS),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "init_std": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return _seeded(BartForConditionalGeneration, BartConfig(**settings | config), seed)


def tiny_classifier_lora(model: Any, seed: int = 1, **config: Any) -> Any:
    """The classifier with a LoRA adapter and a head of its own, as if both had been trained."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, **config)
        tuned = get_peft_model(model, adapter)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            elif "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return tuned.eval()


def some_words(rows: int, seed: int = 0) -> list[str]:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row in range(rows):
        count = 1 + int(torch.randint(1, 9, (), generator=generator)) + row % 3
        chosen = torch.randint(0, len(WORDS), (count,), generator=generator)
        texts.append(" ".join(WORDS[int(i)] for i in chosen))
    return texts
