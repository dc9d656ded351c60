"""rotate: Triton and the CPU against the reference."""

import pytest
import torch
from inputs import DEVICE, SEED, assert_close, layouts, normal

from rapidin import ops
from rapidin.ops import Cut


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("width", [1, 2, 8, 16, 128, 256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_the_reference(width, inverse):
    n, blocks = (3, 2) if width > 1000 else (19, 3)
    x = normal(n, blocks, width)
    wanted = ops.rotate(x, seed=SEED, inverse=inverse, backend="reference")
    assert_close(ops.rotate(x, seed=SEED, inverse=inverse), wanted)
    got = ops.rotate(x.to(DEVICE), seed=SEED, inverse=inverse, backend="triton")
    assert_close(got.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("counts", [(5, 0, 64, 1), (7, 7, 7, 7), (0, 0, 0, 0), (64, 64, 64, 64)])
@pytest.mark.parametrize("sized", [False, True])
def test_rotate_subtracts_cuts_and_divides(counts, sized):
    x, mean, size = normal(70, 4, 64), normal(4, 64, seed=1), normal(4, seed=2).abs() + 0.1
    here = Cut(counts, 64, x.device, size if sized else None)
    wanted = ops.rotate(x, seed=3, mean=mean, cut=here, backend="reference")
    assert_close(ops.rotate(x, seed=3, mean=mean, cut=here), wanted)
    there = Cut(counts, 64, DEVICE, size.to(DEVICE) if sized else None)
    got = ops.rotate(x.to(DEVICE), seed=3, mean=mean.to(DEVICE), cut=there, backend="triton")
    assert_close(got.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_rotate_reads_any_layout_and_rows_far_apart():
    x = normal(4, 3, 256)
    wanted = ops.rotate(x, seed=1, backend="reference")
    for same in layouts(x).values():
        assert_close(ops.rotate(same.to(DEVICE), seed=1, backend="triton").cpu(), wanted)
    found = ops.rotate(x.to(DEVICE)[:, 1:], seed=1, backend="triton")
    assert_close(found.cpu(), ops.rotate(x[:, 1:], seed=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_rotate_of_small_and_large_numbers_is_as_exact():
    x = normal(6, 2, 512) * torch.tensor([1e-30, 1e-10, 1e-3, 1.0, 1e10, 1e30])[:, None, None]
    found = ops.rotate(x.to(DEVICE), seed=5, backend="triton")
    assert_close(found.cpu(), ops.rotate(x, seed=5, backend="reference"), 1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
def test_what_rotate_does_not_take():
    with pytest.raises(ValueError, match="power of two"):
        ops.rotate(torch.zeros(1, 1, 48), seed=0)
    with pytest.raises(ValueError, match="at most 8192"):
        ops.rotate(torch.zeros(1, 1, 16384).to(DEVICE), seed=0, backend="triton")
    with pytest.raises(TypeError, match="float32"):
        ops.rotate(torch.zeros(1, 1, 64).half(), seed=0)
    with pytest.raises(ValueError, match="mean must be"):
        ops.rotate(torch.zeros(1, 1, 64), seed=0, mean=torch.zeros(2, 64))
    with pytest.raises(ValueError, match="cut must be"):
        ops.rotate(torch.zeros(1, 1, 64), seed=0, cut=Cut((3,), 32, torch.device("cpu")))
    with pytest.raises(ValueError, match="counts must be"):
        Cut((65,), 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="size must be"):
        Cut((3,), 64, torch.device("cpu"), torch.ones(2))
