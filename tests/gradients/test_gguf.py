"""A folder with one GGUF file as the model: the same weights and tokens as the folder it was made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from tiny import tiny_llama, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.evaluate import ground_truth
from rapidin.evaluate.settings import GroundTruthSettings, Recipe
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


def test_a_gguf_model_is_tuned_and_saved_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf", tiny_llama(), tiny_tokenizer())
    loaded = load_model(str(tmp_path / "model"))
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved")).identity == loaded.identity

    rows = [{"prompt": f"{n} ", "completion": f"is {n * n}"} for n in range(8)]
    settings = GroundTruthSettings(
        Recipe(epochs=1, batch=4), lora=None, subsets=3, checkpoints=0, max_length=24
    )
    truth = ground_truth.make(tmp_path / "truth", str(tmp_path / "model"), rows, rows[:2], settings)
    assert not np.isnan(truth.losses).any()
    assert truth.tuned("cpu").load().identity != loaded.identity
