"""The checks that all ops share: tensors, their devices, and the limits of widths and seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rapidin.ops.checks import check_sketch, nothing


@pytest.mark.parametrize(("dim", "seed"), [(1, 0), (2**31 - 1, 2**64 - 1), (64, 7)])
def test_widths_and_seeds_within_the_limits_pass(dim: int, seed: int) -> None:
    check_sketch("op", dim, seed)


@pytest.mark.parametrize(
    ("dim", "seed", "words"),
    [
        (0, 0, "op: dim must be at least 1 and below 2147483648, got 0"),
        (-1, 0, "op: dim must be at least 1"),
        (2**31, 0, "op: dim must be at least 1 and below 2147483648, got 2147483648"),
        (1, -1, "op: seed must be at least 0 and below 18446744073709551616, got -1"),
        (1, 2**64, "op: seed must be at least 0"),
    ],
)
def test_widths_and_seeds_beyond_the_limits_are_refused(dim: int, seed: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sketch("op", dim, seed)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_widths_and_seeds_are_whole_numbers(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"op: dim must be an int, got {kind}"):
        check_sketch("op", value, 0)
    with pytest.raises(TypeError, match=f"op: seed must be an int, got {kind}"):
        check_sketch("op", 1, value)


def test_the_sketch_of_nothing_is_zero() -> None:
    made = nothing(2, 3, device=torch.device("cpu"))
    assert torch.equal(made, torch.zeros(2, 3))
    assert made.dtype == torch.float32
