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
# The versions of transformers with which rapidin gets a type wrong, and why.
WRONG = {
    "recurrent_gemma": (
        "4.57",
        "its layers keep the last call's state, which a batch of another size does not fit",
    ),
}


@pytest.mark.parametrize("name", rows("Causal model types", FAST, WRONG))
def test_the_gradients_of_a_type(name: str) -> None:
    check_row("Causal model types", name)
