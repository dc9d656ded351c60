"""Quantised weights: their gradients are those of the weights that they stand for, or are refused."""

from __future__ import annotations

import pytest
from model_rows import check_row, rows

FAST = ["torchao, int8", "bitsandbytes, NF4"]


@pytest.mark.parametrize("name", rows("Quantised weights", FAST))
def test_the_gradients_of_quantised_weights(name: str) -> None:
    check_row("Quantised weights", name)
