"""Each causal model type of transformers: its gradients are autograd's, or are refused with the reason."""

from __future__ import annotations

import pytest
from model_rows import check_row, rows

FAST = [
    "llama",
    "gpt2",
    "opt",
    "mixtral",
    "qwen3_moe",
    "gemma3_text",
    "mamba",
    "deepseek_v3",
    "roberta, encoder",
]


@pytest.mark.parametrize("name", rows("Causal model types", FAST))
def test_the_gradients_of_a_type(name: str) -> None:
    check_row("Causal model types", name)
