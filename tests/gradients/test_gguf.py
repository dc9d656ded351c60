"""A folder with one GGUF file as the model: the same weights and tokens as the folder it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.gradients.load import load_model

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")


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
