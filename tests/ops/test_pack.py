"""pack, unpack and the scan of packed rows: the reference, exact integers, the same bits everywhere."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import (
    DEVICE,
    DTYPES,
    INSTRUCTION_SETS,
    away_from_ties,
    instruction_set,
    layouts,
    normal,
    torch_threads,
)
from poison import poisoned
from properties import tries

from rapidin import ops
from rapidin.ops import Packed, pack, packed_bytes, unpack

PACKED = ("sign", "int4", "int8")
WIDTHS = (1, 7, 63, 64, 65, 127, 128, 511, 512, 513, 1000, 1025, 13440)
ROWS = (0, 1, 47, 48, 49, 500)
LIMIT = {"sign": 127, "int4": 127, "int8": 4095}  # integer queries up to here are scanned exactly


def codes(rows, width, dtype, seed=0):
    """Any codes at all, with rows further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    size = packed_bytes(width, dtype)
    spread = torch.randint(0, 256, (rows, size + 3), generator=generator, dtype=torch.uint8)[:, 1 : 1 + size]
    return spread.view(torch.int8) if dtype == "int8" else spread


def filled(value, width, dtype):
    """Five rows whose bytes are all the same."""
    bytes_ = torch.full((5, packed_bytes(width, dtype)), value, dtype=torch.uint8)
    return Packed(bytes_.view(torch.int8) if dtype == "int8" else bytes_, dtype, width, None)


def integer_queries(queries, width, dtype, seed=0):
    limit = LIMIT[dtype]
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-limit, limit + 1, (queries, width), generator=generator).float()
    found[:, seed % width] = limit
    return found


def assert_equal(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))


# ---- pack ----


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", WIDTHS)
def test_pack_is_the_reference(width, dtype, name):
    x = away_from_ties(20, width, dtype)
    wanted = pack(x, dtype, backend="reference")
    with instruction_set(name):
        got = pack(x, dtype)
        numbers = unpack(got)
    assert torch.equal(got.codes, wanted.codes)
    torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(numbers, unpack(got, backend="reference"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("of", [torch.float16, torch.bfloat16])
def test_pack_reads_halves_and_strided_rows(of, dtype):
    x = normal(9, 1300).to(of)
    wide = torch.full((9, 2600), torch.nan, dtype=of)
    wide[:, 5:1305] = x
    wanted = pack(x.float(), dtype)
    for given_rows in (x, wide[:, 5:1305], x.T.contiguous().T):
        got = pack(given_rows, dtype)
        assert torch.equal(got.codes, wanted.codes)
        assert torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
def test_the_bits_of_pack_depend_on_the_rows_alone(dtype, name):
    x = normal(203, 777)
    wanted = pack(x, dtype)
    with instruction_set(name):
        for threads in (1, 2, 3):
            with torch_threads(threads):
                got = pack(x, dtype)
                assert torch.equal(got.codes, wanted.codes)
                assert torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", PACKED)
def test_rows_without_a_direction(dtype, backend):
    x = normal(6, 100)
    x[1], x[2, 3], x[3, 4], x[4] = 0.0, torch.nan, torch.inf, 1e-42 * torch.arange(1, 101)
    packed = pack(x, dtype, backend=backend)
    assert packed.scale[1] == 0
    assert bool(packed.scale[2:4].isnan().all())
    assert not bool(packed.codes[2:4].any())
    assert packed.scale[4] > 0 or dtype == "int8"  # whose step float32 cannot hold
    found = ops.topk_scan(packed, normal(2, 100, seed=1), 6, backend=backend)
    for j in range(2):
        assert set(found[1][j].tolist()) == {0, 1, 4, 5, -1}


@pytest.mark.parametrize("dtype", PACKED)
def test_padding_is_zero(dtype):
    packed = pack(torch.ones(1, 515), dtype)
    again = Packed(
        packed.codes, dtype, packed.codes.shape[1] * {"sign": 8, "int4": 2, "int8": 1}[dtype], None
    )
    assert packed_bytes(515, dtype) == {"sign": 65, "int4": 258, "int8": 515}[dtype]
    if dtype == "sign":
        assert unpack(again)[0, 512:].tolist() == [1.0] * 3 + [-1.0] * 5
    assert bool((unpack(packed) > 0).all())


@pytest.mark.parametrize("dtype", PACKED)
def test_a_row_with_itself_is_exact(dtype):
    x = normal(30, 700).abs() ** 3
    squares = x.double().square().sum(1)
    torch.testing.assert_close((unpack(pack(x, dtype)).double() * x).sum(1), squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "spread"), [("sign", 0.8), ("int4", 0.12), ("int8", 0.02)])
def test_products_are_unbiased_over_rotations(dtype, spread):
    """The mean over many rotations is the product; one alone is off by at most about spread / sqrt(width)."""
    width, rotations = 64, 3000
    x, y = normal(width).abs() ** 2, normal(width, seed=1)
    x, y = x / x.norm(), (y / y.norm() + x / x.norm()) / 2  # a large product, where a bias would show
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(rotations, width, width, generator=generator)).Q
    products = (unpack(pack(basis @ x, dtype)) * (basis @ y)).sum(1).double()
    error = products - float(x @ y)
    assert error.std() < spread / width**0.5
    assert abs(error.mean()) < 4 * error.std() / rotations**0.5


# ---- scan ----


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", WIDTHS)
def test_integers_are_scanned_exactly(width, dtype, name):
    rows = Packed(codes(49, width, dtype), dtype, width, None)
    for queries in (1, 2, 3, 6, 7, 17):
        q = integer_queries(queries, width, dtype)
        wanted = ops.topk_scan_both_ends(rows, q, 60, backend="reference")
        with instruction_set(name):
            assert_equal(ops.topk_scan_both_ends(rows, q, 60), wanted)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("more", [-9, 0, 130])
def test_long_rows_are_scanned_exactly(more, dtype, name):
    """Rows of two pieces of 2,048 bytes, whose sums are taken by themselves, and a few numbers more."""
    width = 2 * 2048 * {"int8": 1, "int4": 2, "sign": 8}[dtype] + more
    rows = Packed(codes(25, width, dtype), dtype, width, None)
    for queries in (1, 2, 3, 9):
        q = integer_queries(queries, width, dtype)
        wanted = ops.topk_scan_both_ends(rows, q, 30, backend="reference")
        with instruction_set(name):
            assert_equal(ops.topk_scan_both_ends(rows, q, 30), wanted)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows_and_queries(rows, dtype):
    width = 600
    packed = Packed(codes(rows, width, dtype), dtype, width, None)
    for queries in range(18):
        q = integer_queries(queries, width, dtype, seed=3)
        assert_equal(ops.topk_scan(packed, q, 9), ops.topk_scan(packed, q, 9, backend="reference"))


@pytest.mark.parametrize("dtype", PACKED)
def test_the_largest_sums_fit(dtype):
    """Every product as large as it can be, over rows longer than what is summed in 32 bits."""
    width = 200_000
    for value in (0, 127, 128, 255):
        rows = filled(value, width, dtype)
        for sign in (1.0, -1.0):
            for queries in (1, 4):
                q = torch.full((queries, width), sign * LIMIT[dtype])
                wanted = ops.topk_scan(rows, q, 5, backend="reference")
                for name in INSTRUCTION_SETS:
                    with instruction_set(name):
                        assert_equal(ops.topk_scan(rows, q, 5), wanted)


# With scales the sets that are faster so take queries as digits, the others as floats.
DIGITS = tuple(name for name in INSTRUCTION_SETS if name not in ("base", "neon"))
SAME = {False: INSTRUCTION_SETS, True: DIGITS or INSTRUCTION_SETS[:1]}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", PACKED)
def test_the_same_bits_everywhere(dtype, blocks):
    packed, q = pack(normal(203, 1234), dtype), normal(17, 1234, seed=1)
    base = normal(17, 203, seed=2)
    more = {"offsets": [0, 7, 300, 1234], "scales": normal(203, 3, seed=3)} if blocks else {}
    with instruction_set(SAME[blocks][0]):
        same = ops.topk_scan(packed, q, 203, base=base, **more)
    for name in INSTRUCTION_SETS:
        with instruction_set(name):
            whole = ops.topk_scan(packed, q, 203, base=base, **more)
            if name in SAME[blocks]:
                assert_equal(whole, same)
            for threads in (1, 2, 3):
                with torch_threads(threads):
                    assert_equal(ops.topk_scan(packed, q, 203, base=base, **more), whole)
            for size in (1, 2, 3, 5, 8):
                parts = [
                    ops.topk_scan(packed, q[j : j + size], 203, base=base[j : j + size], **more)
                    for j in range(0, 17, size)
                ]
                assert_equal([torch.cat(x) for x in zip(*parts, strict=True)], whole)
            scores = whole[0].gather(1, whole[1].argsort(1))  # by row
            for first in (1, 2, 3, 50):  # rows in other blocks
                rows = Packed(packed.codes[first:], dtype, packed.width, packed.scale[first:])
                some = {"scales": more["scales"][first:], "offsets": more["offsets"]} if blocks else {}
                found = ops.topk_scan(rows, q, 203, base=base[:, first:], **some)
                assert torch.equal(found[0].gather(1, found[1].argsort(1)), scores[:, first:])


@pytest.mark.parametrize(("dtype", "limit"), [("sign", 0.02), ("int4", 0.02), ("int8", 6e-4)])
def test_rounding_queries_costs_little(dtype, limit):
    """Against exact products of the same codes, relative to the spread of the scores."""
    packed, q = pack(normal(300, 3000), dtype), normal(6, 3000, seed=1)
    scores, indices = ops.topk_scan(packed, q, 300)
    exact = (q.double() @ unpack(packed).double().T).gather(1, indices)
    assert float((scores - exact).std() / exact.std()) < limit


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("scale", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_parts_side_by_side(queries, scale, name):
    widths = (300, 513, 100, 700, 64)
    x = [normal(70, width, seed=i) for i, width in enumerate(widths)]
    parts = [x[0], pack(x[1], "sign"), x[2].half(), pack(x[3], "int4"), pack(x[4], "int8")]
    parts = [
        p if isinstance(p, torch.Tensor) else Packed(p.codes, p.dtype, p.width, p.scale.to(scale))
        for p in parts
    ]
    q, base = normal(queries, sum(widths), seed=9), normal(queries, 70, seed=10)
    base[0, 3] = torch.nan
    valid = torch.arange(70) % 7 != 0
    more = {"base": base, "valid": valid}
    with instruction_set(name):
        got = ops.topk_scan_both_ends(parts, q, 80, **more)
    wanted = ops.topk_scan_both_ends(parts, q, 80, **more, backend="reference")
    assert 3 not in got[1][0].tolist()
    assert torch.equal(got[0].isnan(), wanted[0].isnan())
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1.0, equal_nan=True)  # of scores around 50
    torch.testing.assert_close(got[2], wanted[2], rtol=0, atol=1.0, equal_nan=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("queries", [1, 9])
def test_blocks_with_scales(queries, dtype, name):
    """Blocks that begin and end anywhere, across parts too."""
    packed = pack(normal(60, 1700), dtype)
    parts = [normal(60, 130, seed=4), packed, normal(60, 70, seed=5).half()]
    offsets = [0, 10, 10, 200, 1154, 1200, 1850, 1900]
    scales, q = normal(60, 7, seed=6), normal(queries, 1900, seed=7)
    with instruction_set(name):
        got = ops.topk_scan_both_ends(parts, q, 60, scales=scales, offsets=offsets)
        for threads in (1, 3):
            with torch_threads(threads):
                assert_equal(ops.topk_scan_both_ends(parts, q, 60, scales=scales, offsets=offsets), got)
    wanted = ops.topk_scan_both_ends(parts, q, 60, scales=scales, offsets=offsets, backend="reference")
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-3)


def blocks_of(width):
    """Edges of blocks with one number, with more than a piece of 512 has, and some at the edges of planes."""
    return sorted({0, 1, 2, 64, 65, width // 3, width // 3 + 600, width - 1, width} & set(range(width + 1)))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", WIDTHS)
def test_integers_are_scanned_exactly_in_blocks(width, dtype, name):
    rows = Packed(codes(49, width, dtype), dtype, width, None)
    offsets = blocks_of(width)
    offsets.insert(1, offsets[1])  # an empty block
    scales = torch.randint(-2, 3, (49, len(offsets) - 1), generator=torch.Generator().manual_seed(1)).float()
    for queries in (1, 2, 7):
        q = integer_queries(queries, width, dtype) % 16 - 8  # so small that float32 has their sums, too
        dots = (q[:, None] * unpack(rows, backend="reference")).double()
        of_blocks = torch.stack([dots[..., a:b].sum(2) for a, b in itertools.pairwise(offsets)], 2)
        wanted = (of_blocks * scales).sum(2).float()
        with instruction_set(name):
            scores, indices = ops.topk_scan(rows, q, 49, scales=scales, offsets=offsets)
        assert torch.equal(scores, wanted.gather(1, indices))
        assert torch.equal(scores, wanted.sort(1, descending=True).values)


@pytest.mark.parametrize("dtype", PACKED)
def test_the_largest_sums_of_blocks_fit(dtype):
    """Every product as large as it can be, with queries whose lower digits are as large as they get."""
    width = 5000
    for value in (0, 127, 128, 255):
        rows = filled(value, width, dtype)
        more = {"scales": torch.ones(5, 2), "offsets": [0, 3000, width]}
        lowest = 8256 / 2**20 if dtype == "int8" else 32896 / 2**22
        for largest in (1.0, 1 - 2**-24, 1 - 2**-8, 1 - 2**-15, 1 / 3, 1 - lowest, lowest - 1):
            q = torch.full((1, width), largest)
            wanted = q.double() @ unpack(rows).double().T
            for name in INSTRUCTION_SETS:
                with instruction_set(name):
                    scores = ops.topk_scan(rows, q, 5, **more)[0]
                torch.testing.assert_close(scores.double(), wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
def test_the_precision_of_blocks_is_that_of_each(dtype, name):
    """Queries whose blocks are as different as the scales are: each keeps its own digits."""
    width, offsets = 900, [0, 300, 310, 900]
    packed, q = pack(normal(40, width), dtype), normal(2, width, seed=1)
    sizes = torch.tensor([1e-30, 1e6, 1e20])
    for block, (begin, end) in enumerate(itertools.pairwise(offsets)):
        q[:, begin:end] *= 1 / sizes[block]
    scales = sizes * torch.rand(40, 3, generator=torch.Generator().manual_seed(2))
    of_blocks = [
        q[:, a:b].double() @ unpack(packed)[:, a:b].double().T for a, b in itertools.pairwise(offsets)
    ]
    wanted = (torch.stack(of_blocks, 2) * scales.double()).sum(2)
    with instruction_set(name):
        scores, indices = ops.topk_scan(packed, q, 40, scales=scales, offsets=offsets)
    error = (scores - wanted.gather(1, indices)).abs().max()
    assert float(error / wanted.abs().max()) < 2e-6


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", PACKED)
def test_nan_and_inf_in_queries_and_scales_of_blocks(dtype, name):
    """A query with NaN or Inf is scored as the reference scores it, and changes no bit of its neighbours."""
    packed, q, scales = pack(normal(50, 1300), dtype), normal(5, 1300, seed=1), normal(50, 3, seed=2)
    more = {"scales": scales, "offsets": [0, 40, 1000, 1300]}
    with instruction_set(name):
        plain = ops.topk_scan_both_ends(packed, q, 50, **more)
    q[1, 3], q[2, 1200], q[2, 7], q[4] = torch.nan, torch.inf, -torch.inf, 0.0
    scales[5, 0], scales[6, 1], scales[7, 2] = torch.nan, torch.inf, 0.0
    wanted = ops.topk_scan_both_ends(packed, q, 50, **more, backend="reference")
    with instruction_set(name):
        got = ops.topk_scan_both_ends(packed, q, 50, **more)
    for scores in (0, 2):
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=1e-3, equal_nan=True)
    for j in (0, 3):
        of_row = dict(zip(plain[1][j].tolist(), plain[0][j].tolist(), strict=True))
        for row, score in zip(got[1][j].tolist(), got[0][j].tolist(), strict=True):
            assert row in (-1, 6, 7) or score == of_row[row]


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("scales", [None, torch.ones(8, 2)])
def test_queries_without_a_score(scales, dtype):
    more = {} if scales is None else {"scales": scales, "offsets": [0, 30, 90]}
    q = normal(4, 90, seed=1)
    q[1, 5], q[2, 6], q[3] = torch.nan, torch.inf, 0.0
    scores, indices = ops.topk_scan(pack(normal(8, 90), dtype), q, 3, **more)
    assert bool((indices[1] == -1).all())
    assert bool((indices[2] == -1).all()) == (scales is None)
    assert indices[3].tolist() == [0, 1, 2]
    assert not bool(scores[3].any())


def test_base_is_added_and_may_forbid_rows():
    packed, q = pack(normal(100, 65), "int4"), normal(3, 65, seed=1)
    base = torch.zeros(3, 200)[:, ::2]
    base[1, 5], base[2, :] = 1e6, torch.nan
    plain, got = ops.topk_scan(packed, q, 4), ops.topk_scan(packed, q, 4, base=base)
    assert torch.equal(got[1][0], plain[1][0])
    assert torch.equal(got[0][0], plain[0][0])
    assert int(got[1][1, 0]) == 5
    assert bool((got[1][2] == -1).all())


@tries(40)
@given(
    rows=st.integers(0, 120),
    width=st.integers(0, 700),
    queries=st.integers(0, 17),
    k=st.integers(0, 130),
    dtype=st.sampled_from(PACKED),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(rows, width, queries, k, dtype, seed):
    packed = Packed(codes(rows, width, dtype, seed), dtype, width, None)
    q = integer_queries(queries, width, dtype, seed) if width else torch.zeros(queries, 0)
    assert_equal(
        ops.topk_scan_both_ends(packed, q, k), ops.topk_scan_both_ends(packed, q, k, backend="reference")
    )


@pytest.mark.parametrize("k", [1, 63, 64, 65, 1000, 1024])
def test_many_hits_of_rising_falling_and_equal_scores(k):
    for scores in (torch.arange(3000), -torch.arange(3000), torch.zeros(3000), torch.arange(3000) % 7):
        column = scores.float()[:, None]
        assert_equal(
            ops.topk_scan_both_ends(column, torch.ones(1, 1), k),
            ops.topk_scan_both_ends(column, torch.ones(1, 1), k, backend="reference"),
        )


def test_outputs_are_written_whole():
    packed = Packed(codes(5, 9, "sign"), "sign", 9, torch.full((5,), torch.nan))
    with poisoned() as given:
        scores, indices = ops.topk_scan(packed, torch.ones(2, 9), 4)
    assert any(x.data_ptr() == indices.data_ptr() for x in given)
    assert bool(scores.isnan().all())
    assert bool((indices == -1).all())


SIGNS = torch.zeros(4, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Packed(SIGNS, "int2", 16, None), ValueError, "packed dtype must be one of"),
        (lambda: Packed(SIGNS, "sign", -1, None), ValueError, "must not be negative"),
        (lambda: Packed(SIGNS, "sign", 17, None), ValueError, "17 numbers of sign are 3 bytes"),
        (lambda: Packed(SIGNS, "int8", 2, None), TypeError, "codes must be int8"),
        (lambda: Packed(SIGNS, "sign", 16, torch.ones(3)), ValueError, "each of the 4 rows"),
        (lambda: Packed(SIGNS, "sign", 16, torch.ones(4).double()), TypeError, "scale must be float32"),
        (lambda: pack(torch.ones(3), "sign"), ValueError, "x must have 2 axes"),
        (lambda: pack(torch.ones(3, 3).long(), "sign"), TypeError, "x must be float32"),
        (lambda: pack(torch.ones(3, 3), "bits"), ValueError, "packed dtype must be one of"),
        (lambda: unpack(SIGNS), TypeError, "must be a rapidin.ops.Packed"),
        (lambda: ops.topk_scan([], torch.ones(1, 3), 1), ValueError, "at least one part"),
        (
            lambda: ops.topk_scan([torch.ones(2, 1), torch.ones(3, 2)], torch.ones(1, 3), 1),
            ValueError,
            "equally",
        ),
        (
            lambda: ops.topk_scan(torch.ones(2, 3), torch.ones(1, 3), 1, base=torch.ones(2)),
            ValueError,
            "base must have 2 axes",
        ),
        (
            lambda: ops.topk_scan(torch.ones(2, 3), torch.ones(1, 3), 1, base=torch.ones(2, 2)),
            ValueError,
            r"base must be \[Q, N\] = \(1, 2\)",
        ),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- in Triton, which is interpreted where there is no GPU ----


GPU_WIDTHS = (1, 7, 64, 65, 127, 511, 512, 515, 1025, 4096, 13443)


def assert_same(got, wanted, x):
    """Same codes, but where a number lies on the edge of its step; scales to the last bits."""
    assert torch.equal(got.codes.cpu(), wanted.codes)
    torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", GPU_WIDTHS)
def test_pack_is_the_reference_on_gpus(width, dtype):
    x = away_from_ties(1 if width > 5000 else 5, width, dtype)
    wanted = pack(x, dtype, backend="reference")
    got = pack(x.to(DEVICE), dtype, backend="triton")
    assert_same(got, wanted, x)
    numbers = unpack(got, backend="triton")
    torch.testing.assert_close(numbers.cpu(), unpack(wanted, backend="reference"), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("rows", [0, 1, 2, 9, 33])
def test_any_number_of_rows(rows, dtype):
    x = away_from_ties(rows, 100, dtype)
    got = pack(x.to(DEVICE), dtype, backend="triton")
    assert_same(got, pack(x, dtype, backend="reference"), x)
    assert unpack(got, backend="triton").shape == (rows, 100)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("of", DTYPES)
def test_pack_reads_halves_and_any_layout(of, dtype):
    x = normal(5, 700).to(of)
    wanted = pack(x.float(), dtype)  # by C++, whose steps are taken in float32 as the kernel's are
    for name, same in layouts(x).items():
        got = pack(same.to(DEVICE), dtype, backend="triton")
        assert int((got.codes.cpu() != wanted.codes).sum()) <= 1, name
        torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton", "poison")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", [100, 5000])
def test_rows_without_a_direction_on_gpus(dtype, width):
    x = normal(6, width)
    x[1], x[2, 3], x[3, 4], x[4] = 0.0, torch.nan, -torch.inf, 1e-42 * (1 + torch.arange(width) % 100)
    x[5] *= 1e30
    packed = pack(x.to(DEVICE), dtype, backend="triton")
    scale, codes = packed.scale.cpu(), packed.codes.cpu()
    assert scale[1] == 0
    assert bool(scale[2:4].isnan().all())
    assert not bool(codes[2:4].any())
    wanted = pack(x, dtype)
    assert torch.equal(codes[[0, 1, 5]], wanted.codes[[0, 1, 5]])
    torch.testing.assert_close(scale[[0, 1, 5]], wanted.scale[[0, 1, 5]], rtol=1e-6, atol=0)
    assert scale[4] > 0 or dtype == "int8"  # whose step float32 cannot hold


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("of", [None, torch.float32, torch.float16])
def test_unpack_reads_any_codes(dtype, of):
    for width in (3, 130, 1300):
        size = packed_bytes(width, dtype)
        spread = torch.randint(0, 256, (7, size + 3), dtype=torch.uint8)[:, 1 : 1 + size]
        codes = spread.view(torch.int8) if dtype == "int8" else spread
        scale = None if of is None else normal(7, 3).to(of)[:, 1]
        wanted = unpack(Packed(codes, dtype, width, scale), backend="reference")
        moved = Packed(codes.to(DEVICE), dtype, width, None if scale is None else scale.to(DEVICE))
        assert torch.equal(unpack(moved, backend="triton").cpu(), wanted)
