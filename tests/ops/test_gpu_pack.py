"""pack, unpack, rotate and unit_blocks on a GPU: the reference, at edges of shapes, dtypes and layouts."""

import pytest
import torch
from inputs import DEVICE, DTYPES, SEED, assert_close, away_from_ties, layouts, normal

from rapidin import ops
from rapidin.ops import Cut, Packed, pack, packed_bytes, unpack
from rapidin.ops.triton import packing

pytest.importorskip("triton")

PACKED = ("sign", "int4", "int8")
WIDTHS = (1, 7, 64, 65, 127, 511, 512, 515, 1025, 4096, 13443)


def on(x):
    return x.to(DEVICE)


def poisoned(monkeypatch):
    """Memory that ops allocate holds what must not be left in it."""
    empty = torch.empty

    def full(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 0x55)

    monkeypatch.setattr(packing.torch, "empty", full)


def assert_same(got, wanted, x):
    """Same codes, but where a number lies on the edge of its step; scales to the last bits."""
    assert torch.equal(got.codes.cpu(), wanted.codes)
    torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=1e-6, atol=0, equal_nan=True)


# ---- pack and unpack ----


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_is_the_reference(width, dtype, monkeypatch):
    x = away_from_ties(1 if width > 5000 else 5, width, dtype)
    wanted = pack(x, dtype, backend="reference")
    poisoned(monkeypatch)
    got = pack(on(x), dtype, backend="triton")
    assert_same(got, wanted, x)
    numbers = unpack(got, backend="triton")
    torch.testing.assert_close(numbers.cpu(), unpack(wanted, backend="reference"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("rows", [0, 1, 2, 9, 33])
def test_any_number_of_rows(rows, dtype, monkeypatch):
    x = away_from_ties(rows, 100, dtype)
    poisoned(monkeypatch)
    got = pack(on(x), dtype, backend="triton")
    assert_same(got, pack(x, dtype, backend="reference"), x)
    assert unpack(got, backend="triton").shape == (rows, 100)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("of", DTYPES)
def test_pack_reads_halves_and_any_layout(of, dtype):
    x = normal(5, 700).to(of)
    wanted = pack(x.float(), dtype)  # by C++, whose steps are taken in float32 as the kernel's are
    for name, same in layouts(x).items():
        got = pack(on(same) if DEVICE.type == "cpu" else same.to(DEVICE), dtype, backend="triton")
        assert int((got.codes.cpu() != wanted.codes).sum()) <= 1, name
        torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", [100, 5000])
def test_rows_without_a_direction(dtype, width, monkeypatch):
    x = normal(6, width)
    x[1], x[2, 3], x[3, 4], x[4] = 0.0, torch.nan, -torch.inf, 1e-42 * (1 + torch.arange(width) % 100)
    x[5] *= 1e30
    poisoned(monkeypatch)
    packed = pack(on(x), dtype, backend="triton")
    scale, codes = packed.scale.cpu(), packed.codes.cpu()
    assert scale[1] == 0
    assert bool(scale[2:4].isnan().all())
    assert not bool(codes[2:4].any())
    wanted = pack(x, dtype)
    assert torch.equal(codes[[0, 1, 5]], wanted.codes[[0, 1, 5]])
    torch.testing.assert_close(scale[[0, 1, 5]], wanted.scale[[0, 1, 5]], rtol=1e-6, atol=0)
    assert scale[4] > 0 or dtype == "int8"  # whose step float32 cannot hold


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("of", [None, torch.float32, torch.float16])
def test_unpack_reads_any_codes(dtype, of):
    for width in (3, 130, 1300):
        size = packed_bytes(width, dtype)
        spread = torch.randint(0, 256, (7, size + 3), dtype=torch.uint8)[:, 1 : 1 + size]
        codes = spread.view(torch.int8) if dtype == "int8" else spread
        scale = None if of is None else normal(7, 3).to(of)[:, 1]
        wanted = unpack(Packed(codes, dtype, width, scale), backend="reference")
        moved = Packed(on(codes), dtype, width, None if scale is None else on(scale))
        assert torch.equal(unpack(moved, backend="triton").cpu(), wanted)


# ---- the rotation ----


@pytest.mark.parametrize("width", [1, 2, 8, 16, 128, 256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_the_reference(width, inverse, monkeypatch):
    n, blocks = (3, 2) if width > 1000 else (19, 3)
    x = normal(n, blocks, width)
    wanted = ops.rotate(x, seed=SEED, inverse=inverse, backend="reference")
    assert_close(ops.rotate(x, seed=SEED, inverse=inverse), wanted)
    poisoned(monkeypatch)
    got = ops.rotate(on(x), seed=SEED, inverse=inverse, backend="triton")
    assert_close(got.cpu(), wanted)


@pytest.mark.parametrize("counts", [(5, 0, 64, 1), (7, 7, 7, 7), (0, 0, 0, 0), (64, 64, 64, 64)])
@pytest.mark.parametrize("sized", [False, True])
def test_rotate_subtracts_cuts_and_divides(counts, sized, monkeypatch):
    x, mean, size = normal(70, 4, 64), normal(4, 64, seed=1), normal(4, seed=2).abs() + 0.1
    here = Cut(counts, 64, x.device, size if sized else None)
    wanted = ops.rotate(x, seed=3, mean=mean, cut=here, backend="reference")
    assert_close(ops.rotate(x, seed=3, mean=mean, cut=here), wanted)
    there = Cut(counts, 64, DEVICE, on(size) if sized else None)
    poisoned(monkeypatch)
    got = ops.rotate(on(x), seed=3, mean=on(mean), cut=there, backend="triton")
    assert_close(got.cpu(), wanted)


def test_rotate_reads_any_layout_and_rows_far_apart():
    x = normal(4, 3, 256)
    wanted = ops.rotate(x, seed=1, backend="reference")
    for same in layouts(x).values():
        assert_close(ops.rotate(same.to(DEVICE), seed=1, backend="triton").cpu(), wanted)
    assert_close(ops.rotate(on(x)[:, 1:], seed=1, backend="triton").cpu(), ops.rotate(x[:, 1:], seed=1))


def test_rotate_of_small_and_large_numbers_is_as_exact():
    x = normal(6, 2, 512) * torch.tensor([1e-30, 1e-10, 1e-3, 1.0, 1e10, 1e30])[:, None, None]
    assert_close(
        ops.rotate(on(x), seed=5, backend="triton").cpu(), ops.rotate(x, seed=5, backend="reference"), 1e-6
    )


def test_what_rotate_does_not_take():
    with pytest.raises(ValueError, match="power of two"):
        ops.rotate(torch.zeros(1, 1, 48), seed=0)
    with pytest.raises(ValueError, match="at most 8192"):
        ops.rotate(on(torch.zeros(1, 1, 16384)), seed=0, backend="triton")
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


# ---- blocks of length 1 ----


@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 1), (5, 3, 100), (2, 1, 8192), (1, 2, 20000)])
def test_unit_blocks_are_the_reference(shape, of, monkeypatch):
    x = normal(*shape).to(of)
    if x.numel() and len(x) > 1:
        x[0, 0] = 0.0
    wanted = ops.unit_blocks(x, backend="reference")
    poisoned(monkeypatch)
    got = ops.unit_blocks(on(x), backend="triton")
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=3e-7, atol=1e-30)


def test_unit_blocks_of_tiny_huge_and_broken_blocks():
    x = normal(5, 1, 64) * torch.tensor([1e-30, 1e30, 1.0, 1.0, 1.0])[:, None, None]
    x[3, 0, 5], x[4, 0, 6] = torch.nan, torch.inf
    unit, length = ops.unit_blocks(on(x), backend="triton")
    torch.testing.assert_close(unit.cpu()[:3].norm(dim=2), torch.ones(3, 1))
    assert not bool(length.cpu()[3:].isfinite().any())
    assert bool(unit.cpu()[3:].isnan().flatten(1).any(1).all())
