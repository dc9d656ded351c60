"""matrix_sketch and embedding_sketch in Triton: against the reference, exact sums, the same bits."""

import pytest
import torch
from inputs import DEVICE, DTYPES, SEED, assert_close, integers, layouts, normal
from poison import poisoned

from rapidin import ops

pytest.importorskip("triton")

SHAPES = ((3, 4), (2, 130, 7), (1, 1), (2, 2, 33, 70), (300, 57), (3, 200, 1), (2, 1, 90))
DIMS = (1, 2, 7, 64, 100, 300)


def on_device(x):
    """A copy there with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


@pytest.mark.parametrize("dim", DIMS)
def test_matrices_agree_with_the_reference(dim):
    for i, shape in enumerate(SHAPES if dim > 2 else SHAPES[:4]):
        grad = normal(*shape, dtype=DTYPES[i % 3])
        wanted = ops.matrix_sketch(grad, dim, seed=SEED, backend="reference")
        for laid_out in layouts(grad).values() if dim in (7, 64) else [grad]:
            got = ops.matrix_sketch(on_device(laid_out), dim, seed=SEED, backend="triton")
            assert_close(got.cpu(), wanted, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact_over_many_parts(dtype):
    for shape, dim in (((2, 300, 200), 16), ((1, 5, 9000), 64), ((2, 9000, 1), 8)):
        grad = integers(*shape, dtype=dtype).to(DEVICE)
        wanted = ops.matrix_sketch(grad, dim, seed=SEED, backend="reference")
        for _ in range(2):
            assert torch.equal(ops.matrix_sketch(grad, dim, seed=SEED, backend="triton"), wanted)


def test_the_same_bits_each_time():
    grad = normal(2, 300, 200).to(DEVICE)
    sketches = [ops.matrix_sketch(grad, 16, seed=1, backend="triton") for _ in range(2)]
    assert torch.equal(*sketches)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 5)])
def test_nothing_to_sketch(shape):
    sketch = ops.matrix_sketch(torch.zeros(shape, device=DEVICE), 16, seed=0, backend="triton")
    assert torch.equal(sketch.cpu(), torch.zeros(*shape[:-2], 16))
    ids, grads = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), torch.zeros(2, 0, 5, device=DEVICE)
    assert torch.equal(ops.embedding_sketch(ids, grads, 8, seed=0, backend="triton").cpu(), torch.zeros(2, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_elements_stay_in_their_bins(bad):
    grad = normal(2, 20, 30).to(DEVICE)
    grad[1, 3, 4] = bad
    sketch = ops.matrix_sketch(grad, 16, seed=0, backend="triton")
    assert (~sketch.isfinite()).sum(1).tolist() == [0, 1]


def test_outputs_are_written_whole():
    grad = integers(2, 300, 200).to(DEVICE)
    wanted = ops.matrix_sketch(grad, 10, seed=1, backend="reference")
    ops.matrix_sketch(grad, 10, seed=1, backend="triton")  # its tables are kept
    with poisoned() as given:
        assert torch.equal(ops.matrix_sketch(grad, 10, seed=1, backend="triton"), wanted)
    assert len(given) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_embeddings_agree_with_the_reference(dim, dtype):
    ids = torch.randint(0, 1000, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    grads = integers(3, 40, 33, dtype=dtype)
    wanted = ops.embedding_sketch(ids.cpu(), grads, dim, seed=SEED, backend="reference")
    for laid_out in layouts(grads).values():
        got = ops.embedding_sketch(ids, on_device(laid_out), dim, seed=SEED, backend="triton")
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("k", [1, 6, 64])
def test_a_product_of_sketched_sides_is_folded_as_it_stands(k):
    from rapidin.kernels.fold import fold

    product = integers(3, k, k).to(DEVICE)
    bins = (torch.arange(k)[:, None] + torch.arange(k)).flatten() % k
    wanted = torch.zeros(3, k).index_add_(1, bins, product.cpu().flatten(1))
    assert torch.equal(fold(product, None, None, k).cpu(), wanted)
