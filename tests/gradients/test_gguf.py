"""A folder with one GGUF file as the model: the same weights and tokens as the folder it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.gradients.load import load_model

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd",
        "model.norm.weight": "output_norm",
        "lm_head.weight": "output",
    }
    if name in outer:
        return outer[name] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a head's rotary pairs side by side."""
    out, size = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, size).swapaxes(1, 2).reshape(out, size)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(core["vocab"], key=core["vocab"].get)
    words += [f"<unused{n}>" for n in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in core["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, value in model.state_dict().items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = rotary_order(
                array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_is_loaded_cached_and_asked(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf", model, tokenizer)
    by_folder = load_model(str(tmp_path / "model"))
    by_file = load_model(str(tmp_path / "model" / "tiny.gguf"))
    assert by_folder.identity == by_file.identity
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(by_folder.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    text = "The capital of France is Paris."
    assert by_folder.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    attributor = Attributor(by_folder, width=32)
    rows = [{"prompt": f"{n} ", "completion": f"is {n * n}"} for n in range(8)]
    cache = attributor.cache(rows, tmp_path / "cache")
    again = Attributor.from_cache(tmp_path / "cache")
    assert [r.top[0].index for r in again.query(cache, rows)] == list(range(8))
