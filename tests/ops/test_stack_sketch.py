"""stack_sketch: sums of shifted sketches against the reference, and the estimate that it promises."""

from __future__ import annotations

import pytest
import torch
from inputs import DEVICE, SEED, assert_close, integers, normal

from rapidin import ops
from rapidin.ops import reference


def stacked(grads: torch.Tensor, dim: int, seed: int = SEED) -> torch.Tensor:
    """grads: [B, E, O, I] -> [B, dim]"""
    examples, count = grads.shape[:2]
    sketches = ops.matrix_sketch(grads.flatten(0, 1), dim, seed=seed)
    pairs = torch.arange(examples * count, device=grads.device)
    return ops.stack_sketch(
        sketches, pairs % count, pairs // count, seed=seed, count=count, examples=examples
    )


def test_agrees_with_the_reference() -> None:
    for shape in ((1, 1, 3, 4), (3, 5, 33, 70), (2, 40, 4, 5)):
        for dim in (16, 24, 128):  # 40 matrices are more than 16 bins
            grads = normal(*shape)
            expected = reference.stack_sketch(grads, dim, seed=SEED)
            assert_close(stacked(grads.to(DEVICE), dim), expected)


def test_integers_are_exact_in_any_order_and_missing_matrices_are_zero() -> None:
    grads = integers(3, 6, 7, 9)
    grads[1, 2:] = 0
    expected = reference.stack_sketch(grads, 32, seed=SEED).float()
    sketches = ops.matrix_sketch(grads.flatten(0, 1), 32, seed=SEED)
    pairs = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    pairs = pairs[(pairs < 8) | (pairs >= 12)]
    got = ops.stack_sketch(sketches[pairs], pairs % 6, pairs // 6, seed=SEED, count=6, examples=3)
    assert torch.equal(got, expected)


def test_what_is_not_finite_stays_with_its_example() -> None:
    sketches = normal(4, 16)
    sketches[1] = float("nan")
    owners = torch.tensor([0, 1, 1, 2])
    got = ops.stack_sketch(sketches, torch.tensor([0, 0, 1, 2]), owners, seed=SEED, count=3, examples=4)
    assert got.isfinite().all(1).tolist() == [True, False, True, True]
    assert not got[3].any()


@pytest.mark.parametrize(("alike", "worst"), [(0.0, 1.25), (2.0, 2.5)])
def test_products_estimate_those_of_the_stacks_without_bias(alike: float, worst: float) -> None:
    # Signs are products of three, so matrices that are alike cost accuracy, though no bias.
    dim, seeds = 64, 400
    x, y = normal(1, 6, 20, 30), normal(1, 6, 20, 30, seed=1)
    x, y = x + alike * x[:, :1], y + alike * x[:, :1]
    estimates = torch.stack([(stacked(x, dim, s) * stacked(y, dim, s)).sum() for s in range(seeds)]).double()
    exact = float((x.double() * y.double()).sum())
    squares = float(x.double().square().sum() * y.double().square().sum())
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / seeds**0.5
    assert float(estimates.var()) < worst * (squares + exact**2) / dim
