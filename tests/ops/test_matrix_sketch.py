"""matrix_sketch: every backend against the reference, and the estimate that it promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    DEVICE,
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
from poison import poisoned
from properties import tries

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


@tries(30)
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


# ---- in Triton, embedding_sketch too, which is interpreted where there is no GPU ----


GPU_SHAPES = ((3, 4), (2, 130, 7), (1, 1), (2, 2, 33, 70), (300, 57), (3, 200, 1), (2, 1, 90))
GPU_DIMS = (1, 2, 7, 64, 100, 300)


def on_device(x):
    """A copy there with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dim", GPU_DIMS)
def test_matrices_agree_with_the_reference(dim):
    for i, shape in enumerate(GPU_SHAPES if dim > 2 else GPU_SHAPES[:4]):
        grad = normal(*shape, dtype=DTYPES[i % 3])
        wanted = ops.matrix_sketch(grad, dim, seed=SEED, backend="reference")
        for laid_out in layouts(grad).values() if dim in (7, 64) else [grad]:
            got = ops.matrix_sketch(on_device(laid_out), dim, seed=SEED, backend="triton")
            assert_close(got.cpu(), wanted, 5e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact_over_many_parts(dtype):
    for shape, dim in (((2, 300, 200), 16), ((1, 5, 9000), 64), ((2, 9000, 1), 8)):
        grad = integers(*shape, dtype=dtype).to(DEVICE)
        wanted = ops.matrix_sketch(grad, dim, seed=SEED, backend="reference")
        for _ in range(2):
            assert torch.equal(ops.matrix_sketch(grad, dim, seed=SEED, backend="triton"), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_the_same_bits_each_time():
    grad = normal(1, 300, 200).to(DEVICE)
    sketches = [ops.matrix_sketch(grad, 16, seed=1, backend="triton") for _ in range(2)]
    assert torch.equal(*sketches)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 5)])
def test_nothing_to_sketch_on_gpus(shape):
    sketch = ops.matrix_sketch(torch.zeros(shape, device=DEVICE), 16, seed=0, backend="triton")
    assert torch.equal(sketch.cpu(), torch.zeros(*shape[:-2], 16))
    ids, grads = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), torch.zeros(2, 0, 5, device=DEVICE)
    assert torch.equal(ops.embedding_sketch(ids, grads, 8, seed=0, backend="triton").cpu(), torch.zeros(2, 8))


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_elements_stay_in_their_bins(bad):
    grad = normal(2, 20, 30).to(DEVICE)
    grad[1, 3, 4] = bad
    sketch = ops.matrix_sketch(grad, 16, seed=0, backend="triton")
    assert (~sketch.isfinite()).sum(1).tolist() == [0, 1]


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_outputs_are_written_whole():
    grad = integers(1, 300, 200).to(DEVICE)
    wanted = ops.matrix_sketch(grad, 10, seed=1, backend="reference")
    ops.matrix_sketch(grad, 10, seed=1, backend="triton")  # its tables are kept
    with poisoned() as given:
        assert torch.equal(ops.matrix_sketch(grad, 10, seed=1, backend="triton"), wanted)
    assert len(given) == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_embeddings_agree_with_the_reference(dim, dtype):
    ids = torch.randint(0, 1000, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads = integers(3, 40, 33, dtype=dtype)
    wanted = ops.embedding_sketch(ids.cpu(), grads, dim, seed=SEED, backend="reference")
    for laid_out in layouts(grads).values():
        got = ops.embedding_sketch(ids, on_device(laid_out), dim, seed=SEED, backend="triton")
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("k", [1, 6, 64])
def test_a_product_of_sketched_sides_is_folded_as_it_stands(k):
    from rapidin.kernels.fold import fold

    product = integers(3, k, k).to(DEVICE)
    bins = (torch.arange(k)[:, None] + torch.arange(k)).flatten() % k
    wanted = torch.zeros(3, k).index_add_(1, bins, product.cpu().flatten(1))
    assert torch.equal(fold(product, None, None, k).cpu(), wanted)
