"""matrix_sketch: against the reference, and the estimate that it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    DTYPES,
    INSTRUCTION_SETS,
    LINEAR_DIMS,
    SEED,
    assert_close,
    instruction_set,
    integers,
    layouts,
    normal,
    torch_threads,
)

from rapidin import ops

SHAPES = ((3, 4), (2, 130, 7), (1, 1), (2, 2, 33, 70), (300, 257))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", LINEAR_DIMS)
def test_agrees_with_the_reference(dim, dtype, name):
    for shape in SHAPES:
        grad = normal(*shape, dtype=dtype)
        wanted = ops.matrix_sketch(grad, dim, seed=SEED, backend="reference")
        with instruction_set(name):
            for laid_out in layouts(grad).values():
                assert_close(ops.matrix_sketch(laid_out, dim, seed=SEED, backend="cpu"), wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 5)])
def test_nothing_to_sketch(shape, backend):
    sketch = ops.matrix_sketch(torch.zeros(shape), 16, seed=0, backend=backend)
    assert torch.equal(sketch, torch.zeros(*shape[:-2], 16))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_integers_are_exact_and_threads_change_nothing(name):
    grad = integers(2, 700, 900)
    wanted = ops.matrix_sketch(grad, 100, seed=SEED, backend="reference")
    noise = normal(1, 2000, 900)
    with instruction_set(name):
        sketches = []
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert torch.equal(ops.matrix_sketch(grad, 100, seed=SEED), wanted)
                sketches.append(ops.matrix_sketch(noise, 100, seed=SEED))
    assert torch.equal(sketches[0], sketches[1])
    assert torch.equal(sketches[0], sketches[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_not_finite_elements_show(bad, backend):
    grad = normal(2, 20, 30)
    grad[1, 3, 4] = bad
    sketch = ops.matrix_sketch(grad, 16, seed=0, backend=backend)
    assert sketch[0].isfinite().all()
    assert (~sketch[1].isfinite()).sum() == 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 50),
    cols=st.integers(1, 50),
    dim=st.integers(1, 80),
    seed=st.integers(0, 2**64 - 1),
    factor=st.integers(-5, 5),
)
def test_linear(rows, cols, dim, seed, factor):
    x, y = integers(rows, cols, seed=1), integers(rows, cols, seed=2)
    together = ops.matrix_sketch(x + factor * y, dim, seed=seed)
    apart = ops.matrix_sketch(x, dim, seed=seed) + factor * ops.matrix_sketch(y, dim, seed=seed)
    assert torch.equal(together, apart)


def test_unbiased_with_the_variance_of_its_kind():
    """<sketch x, sketch y> over seeds: mean <x, y>, variance about (|x|^2 |y|^2 + <x, y>^2) / dim."""
    x = normal(24, 40, seed=1)
    y = 0.5 * x + normal(24, 40, seed=2)
    exact = float((x * y).sum())
    dim, seeds = 64, 2000
    both = torch.stack([x, y])
    estimates = torch.empty(seeds)
    for seed in range(seeds):
        sketch = ops.matrix_sketch(both, dim, seed=seed)
        estimates[seed] = sketch[0] @ sketch[1]
    spread = float(((x**2).sum() * (y**2).sum() + exact**2) / dim) ** 0.5
    assert abs(float(estimates.mean()) - exact) < 4 * spread / seeds**0.5
    # four independent signs are two of each: pairs in the same row or column weigh more than a flat sketch's
    assert 0.7 < float(estimates.std()) / spread < 1.35


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least 2 axes"):
        ops.matrix_sketch(torch.zeros(4), 8, seed=0)
    with pytest.raises(TypeError, match="float64"):
        ops.matrix_sketch(torch.zeros(4, 4, dtype=torch.float64), 8, seed=0)
    with pytest.raises(TypeError, match="dense"):
        ops.matrix_sketch(torch.zeros(4, 4).to_sparse(), 8, seed=0)
