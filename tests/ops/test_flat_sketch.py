"""flat_sketch: each backend against the reference, exact sums, and the estimate that it promises."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    DTYPES,
    FLAT_DIMS,
    FLAT_SIZES,
    INSTRUCTION_SETS,
    SEED,
    assert_close,
    instruction_set,
    integers,
    normal,
    torch_threads,
)

from rapidin import ops

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "sketches.json").read_text())


def some_tensors(make=normal, dtype=torch.float32, batch=()):
    return [make(*batch, *size, seed=i, dtype=dtype) for i, size in enumerate(FLAT_SIZES)]


@pytest.mark.parametrize("case", GOLDEN["flat"], ids=lambda c: f"{c['seed']}-{c['dim']}")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sketches_are_those_written_down(case, backend):
    tensors = [torch.tensor(x) for x in case["tensors"]]
    sketch = ops.flat_sketch(tensors, case["dim"], seed=case["seed"], backend=backend)
    assert torch.equal(sketch, torch.tensor(case["sketch"]))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", FLAT_DIMS)
def test_agrees_with_the_reference(dim, dtype, name):
    tensors, batched = some_tensors(dtype=dtype), some_tensors(dtype=dtype, batch=(3,))
    wanted = ops.flat_sketch(tensors, dim, seed=SEED, backend="reference")
    wanted_batched = ops.flat_sketch(batched, dim, seed=SEED, batched=True, backend="reference")
    with instruction_set(name):
        # 1e-5: in very few bins thousands of elements nearly cancel
        assert_close(ops.flat_sketch(tensors, dim, seed=SEED, backend="cpu"), wanted, 1e-5)
        assert_close(ops.flat_sketch(batched, dim, seed=SEED, batched=True), wanted_batched, 1e-5)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*FLAT_DIMS, 128 * 7, 128 * 33])
def test_integers_are_exact(dim, dtype, name):
    tensors = [*some_tensors(integers, dtype), integers(300_001, seed=9, dtype=dtype)]
    wanted = ops.flat_sketch(tensors, dim, seed=SEED, backend="reference")
    with instruction_set(name):
        assert torch.equal(ops.flat_sketch(tensors, dim, seed=SEED), wanted)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dim", [16, 128, 1024])
def test_threads_change_nothing(dim, name):
    tensors = [normal(2, 150_001), *some_tensors(batch=(2,))]
    sketches = []
    for threads in (1, 2, 3):
        with instruction_set(name), torch_threads(threads):
            sketches.append(ops.flat_sketch(tensors, dim, seed=SEED, batched=True))
            one = ops.flat_sketch([x[1] for x in tensors], dim, seed=SEED)
        assert torch.equal(sketches[0], sketches[-1])
        assert torch.equal(one, sketches[0][1])


def test_batches_agree_with_their_items_and_layouts_change_nothing():
    x = normal(4, 30, 20)
    spread = torch.empty(4, 60, 20)
    spread[:, ::2] = x
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = ops.flat_sketch([x], 256, seed=1, batched=True)
    for same in (spread[:, ::2], turned):
        assert torch.equal(ops.flat_sketch([same], 256, seed=1, batched=True), wanted)
    for b in range(4):
        assert torch.equal(ops.flat_sketch([x[b]], 256, seed=1), wanted[b])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_to_sketch(backend):
    assert torch.equal(ops.flat_sketch([], 128, seed=0, backend=backend), torch.zeros(128))
    assert torch.equal(ops.flat_sketch([torch.zeros(0)], 128, seed=0, backend=backend), torch.zeros(128))
    empty = ops.flat_sketch([torch.zeros(0, 5)], 128, seed=0, batched=True, backend=backend)
    assert empty.shape == (0, 128)
    scalar = ops.flat_sketch([torch.tensor(3.0)], 128, seed=0, backend=backend)
    assert scalar.abs().sum() == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("at", [5, 700])  # within a whole row, and in the last short one
def test_not_finite_elements_show(bad, backend, at):
    x = normal(701)
    x[at] = bad
    assert (~ops.flat_sketch([x], 256, seed=0, backend=backend).isfinite()).sum() == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_scales_and_squares(backend):
    tensors = [integers(3, 200, seed=i) for i in range(3)]
    scales = torch.tensor([2.0, 0.0, -1.0])
    named = {"seed": SEED, "batched": True, "backend": backend}
    sketch, squares = ops.flat_sketch(tensors, 128, scales=scales, squares=True, **named)
    scaled = [x * scale for x, scale in zip(tensors, scales, strict=True)]
    assert torch.equal(sketch, ops.flat_sketch(scaled, 128, **named))
    assert torch.equal(squares, torch.stack([x.square().sum(1) for x in tensors], 1))
    one, squares_of_one = ops.flat_sketch(
        [x[1] for x in tensors], 128, seed=SEED, scales=scales, squares=True, backend=backend
    )
    assert torch.equal(one, sketch[1])
    assert torch.equal(squares_of_one, squares[1])


def test_an_empty_tensor_takes_no_row():
    x, y = normal(200), normal(300, seed=1)
    apart = ops.flat_sketch([x, torch.zeros(0), y], 512, seed=0)
    assert torch.equal(apart, ops.flat_sketch([x, y], 512, seed=0))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    dim=st.sampled_from([1, 4, 32, 128, 384, 1024]),
    seed=st.integers(0, 2**64 - 1),
    factor=st.integers(-5, 5),
)
def test_linear(sizes, dim, seed, factor):
    x = [integers(n, seed=i) for i, n in enumerate(sizes)]
    y = [integers(n, seed=100 + i) for i, n in enumerate(sizes)]
    together = ops.flat_sketch([a + factor * b for a, b in zip(x, y, strict=True)], dim, seed=seed)
    apart = ops.flat_sketch(x, dim, seed=seed) + factor * ops.flat_sketch(y, dim, seed=seed)
    assert torch.equal(together, apart)


def test_unbiased_with_at_most_the_variance_of_a_random_sketch():
    """Elements of two chunks meet in a bin with probability 1 / dim, those of one chunk never."""
    x = normal(6000, seed=1)
    x[::128] *= 8  # an outlier feature: always the same place in a row
    y = 0.3 * x + normal(6000, seed=2)
    exact = float(x @ y)
    dim, seeds = 512, 2000
    estimates = torch.empty(seeds)
    for seed in range(seeds):
        sketch = ops.flat_sketch([torch.stack([x, y])], dim, seed=seed, batched=True)
        estimates[seed] = sketch[0] @ sketch[1]
    variance = float(((x**2).sum() * (y**2).sum() + exact**2 - 2 * (x**2 * y**2).sum()) / dim)
    assert abs(float(estimates.mean()) - exact) < 4 * (variance / seeds) ** 0.5
    assert 0.75 < float(estimates.var()) / variance < 1.15


@pytest.mark.parametrize("dim", [0, 3, 100, 130, 200])
def test_dims_that_cannot_be(dim):
    with pytest.raises(ValueError, match="dim must be"):
        ops.flat_sketch([torch.zeros(4)], dim, seed=0)


def test_mistakes_are_named():
    with pytest.raises(TypeError, match=r"pass \[tensor\]"):
        ops.flat_sketch(torch.zeros(4), 128, seed=0)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be float32, float16, bfloat16, got int64"):
        ops.flat_sketch([torch.zeros(4), torch.zeros(4, dtype=torch.int64)], 128, seed=0)
    with pytest.raises(ValueError, match="one batch size"):
        ops.flat_sketch([torch.zeros(2, 4), torch.zeros(3, 4)], 128, seed=0, batched=True)
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.flat_sketch([], 128, seed=0, batched=True)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, backend="gpu")
    with pytest.raises(ValueError, match="one entry for each of the 1 tensors, got 2"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, scales=torch.ones(2))
    with pytest.raises(TypeError, match="scales must be float32"):
        ops.flat_sketch([torch.zeros(4)], 128, seed=0, scales=torch.ones(1, dtype=torch.float64))
