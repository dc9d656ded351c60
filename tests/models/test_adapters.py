"""Each kind of adapter of peft: its gradients are autograd's, or are refused with the reason."""

from __future__ import annotations

import pytest
from model_rows import check_row, rows

FAST = ["LoRA", "LoRA, embedding", "DoRA", "Prompt tuning", "IA3"]


@pytest.mark.parametrize("name", rows("Adapters", FAST))
def test_the_gradients_of_an_adapter(name: str) -> None:
    check_row("Adapters", name)
