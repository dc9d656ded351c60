"""Each kind of quantised weights: its gradients are those of the weights that it stands for, or are refused."""

from __future__ import annotations

import pytest
from model_rows import check_row, rows

FAST = ["torchao, int8", "bitsandbytes, NF4", "BitNet, rounded while it runs"]
WRONG: dict[str, str] = {}


@pytest.mark.parametrize("name", rows("Quantised weights", FAST, WRONG))
def test_the_gradients_of_quantised_weights(name: str) -> None:
    check_row("Quantised weights", name)
