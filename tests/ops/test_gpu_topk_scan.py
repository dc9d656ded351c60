"""topk_scan on GPUs against the reference, and against the CPU for the bits of packed rows.

Interpreted and emulated kernels are slow, so sizes are just beyond those at which something changes: a
tile, a group, a unit, a list that is full.
"""

from itertools import product

import pytest
import torch
from inputs import DEVICE, integers, normal
from torch.utils._python_dispatch import TorchDispatchMode

from rapidin import ops
from rapidin.ops import Packed, gpu_scan, pack, packed_bytes

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PACKED = ("sign", "int4", "int8")
EVERY = (*FLOATS, *PACKED)
# Where kernels are interpreted, large shapes take seconds: float16 and bfloat16 have them on a GPU alone.
LARGE = EVERY if DEVICE.type == "cuda" else (torch.float32, *PACKED)
SMALL_SHAPES = [(1, 1, 1, 1, 0), (7, 3, 3, 9, 1), (300, 72, 1, 12, 0)]
LARGE_SHAPES = [(70, 129, 17, 5, 5), (270, 513, 2, 300, 4)]
LIMIT = {"sign": 127, "int4": 127, "int8": 4095}


def on_device(x):
    if isinstance(x, Packed):
        scale = None if x.scale is None else x.scale.to(DEVICE)
        return Packed(spread(x.codes), x.dtype, x.width, scale)
    if isinstance(x, list):
        return [on_device(each) for each in x]
    return spread(x) if isinstance(x, torch.Tensor) and x.ndim == 2 else x.to(DEVICE)


def spread(x):
    """The same there, rows as far apart and as far from where memory begins as here, and none behind them."""
    if not x.numel():
        return x.to(DEVICE)
    numbers = (
        x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    )
    memory = torch.empty(numbers, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def both_ends(backend, cache, queries, k, **more):
    more = {name: on_device(x) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    found = ops.topk_scan_both_ends(on_device(cache), on_device(queries), k, backend=backend, **more)
    return [x.cpu() for x in found]


def assert_same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(0.0, 1e38, -1e38), y.nan_to_num(0.0, 1e38, -1e38))


def assert_near(got, wanted, cache, queries, more=None):
    """Scores near the reference's, places taken by rows whose own score is near too."""
    assert torch.equal(got[0].isnan(), wanted[0].isnan())
    assert torch.equal(got[2].isnan(), wanted[2].isnan())
    size = float(wanted[0].nan_to_num(0.0).abs().max())
    n = len(cache[0] if isinstance(cache, list) else cache)
    every = ops.topk_scan(cache, queries, n, backend="reference", **(more or {}))
    for j in range(len(queries)):
        of_row = dict(zip(every[1][j].tolist(), every[0][j].tolist(), strict=True))
        for scores, indices, right in ((got[0], got[1], wanted[0]), (got[2], got[3], wanted[2])):
            there = indices[j] >= 0
            own = torch.tensor([of_row[i] for i in indices[j][there].tolist()])
            torch.testing.assert_close(scores[j][there], own, rtol=1e-5, atol=2e-6 * size)
            torch.testing.assert_close(scores[j][there], right[j][there], rtol=1e-5, atol=2e-6 * size)
            assert len(set(indices[j][there].tolist())) == int(there.sum())


def codes(rows, width, dtype, seed=0, gap=3):
    generator = torch.Generator().manual_seed(seed)
    size = packed_bytes(width, dtype)
    wide = torch.randint(0, 256, (rows, size + gap), generator=generator, dtype=torch.uint8)
    return (wide.view(torch.int8) if dtype == "int8" else wide)[:, gap // 2 : gap // 2 + size]


def case(rows, width, queries, dtype, seed=0, gap=0):
    """A cache and queries whose scores are exact, many of them equal."""
    if dtype in PACKED:
        limit = LIMIT[dtype]
        generator = torch.Generator().manual_seed(seed)
        q = torch.randint(-limit, limit + 1, (queries, width), generator=generator).float()
        q[:, seed % width] = limit
        return Packed(codes(rows, width, dtype, seed, gap), dtype, width, None), q
    cache = integers(rows, width + gap, seed=seed, size=2).to(dtype)[:, gap // 2 : gap // 2 + width]
    return cache, integers(queries, width, seed=seed + 1, size=2)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(SMALL_SHAPES, EVERY), *product(LARGE_SHAPES, LARGE)], ids=str
)
def test_exact_scores_and_ties(gpu, shape, dtype):
    rows, width, queries, k, gap = shape
    cache, q = case(rows, width, queries, dtype, gap=gap)
    wanted = ops.topk_scan_both_ends(cache, q, k, backend="reference")
    assert_same(both_ends(gpu, cache, q, k), wanted)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("queries", [1, 9])
def test_rows_of_any_stride(emulated_cuda, dtype, queries):
    """Rows that begin at any byte, and padded ones with NaN or ones between them, up to the end of memory."""
    each = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
    numbers = {"sign": 8, "int4": 2}.get(dtype, 1)
    width = 233 * numbers // each - (numbers > 1)
    x, q = case(37, width, queries, dtype)
    wanted = ops.topk_scan_both_ends(x, q, 20, backend="reference")
    rows = x.codes if isinstance(x, Packed) else x
    for begin, stride in ((0, 233), (1, 233), (5, 238), (3, 239), (0, 240), (4, 244), (8, 248), (14, 257)):
        if stride % each or begin % each:
            continue
        memory = torch.full((begin + 36 * stride + 233 // each * each,), 255, dtype=torch.uint8)
        size = rows.shape[1], stride // each, begin // each
        there = memory.view(rows.dtype).as_strided((37, size[0]), (size[1], 1), size[2]).copy_(rows)
        cache = Packed(there, dtype, width, None) if isinstance(x, Packed) else there
        assert_same(both_ends("cuda", cache, q, 20), wanted)


@pytest.mark.parametrize("dtype", EVERY if DEVICE.type == "cuda" else (torch.float16, "int4"))
def test_both_ends_are_two_scans(gpu, dtype):
    cache, q = case(90, 40, 5, dtype, seed=3)
    got = both_ends(gpu, cache, q, 7)
    for largest, wanted in ((True, got[:2]), (False, got[2:])):
        found = ops.topk_scan(on_device(cache), q.to(DEVICE), 7, largest=largest, backend=gpu)
        assert_same([x.cpu() for x in found], wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [1, 6])
def test_scores_are_near(gpu, queries, dtype):
    cache, q = normal(120, 1100).to(dtype), normal(queries, 1100, seed=1) * 1e-3
    wanted = ops.topk_scan_both_ends(cache, q, 11, backend="reference")
    assert_near(both_ends(gpu, cache, q, 11), wanted, cache, q)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("queries", [1, 9])
def test_packed_rows_have_the_bits_of_the_cpu(gpu, queries, dtype):
    packed, q = pack(normal(40, 700), dtype), normal(queries, 700, seed=1)
    packed = Packed(packed.codes, dtype, 700, packed.scale.half() if queries == 1 else packed.scale)
    base = normal(queries, 40, seed=2)
    q[0, 3] = torch.nan if queries > 1 else 0.5
    got = both_ends(gpu, packed, q, 40, base=base)
    assert_same(got, ops.topk_scan_both_ends(packed, q, 40, base=base, backend="cpu"))


@pytest.mark.parametrize("dtype", PACKED)
def test_queries_halfway_between_integers_have_the_bits_of_the_cpu(gpu, dtype):
    """73 of 146 is 63.5 of 127: by a reciprocal of 146 it would be less. So is 2,052 of 4,104."""
    packed, q = Packed(codes(20, 200, dtype), dtype, 200, None), normal(2, 200, seed=1).round()
    q[0, :3], q[1, :3] = torch.tensor([146.0, 73.0, -73.0]), torch.tensor([4104.0, 2052.0, -2052.0])
    assert_same(both_ends(gpu, packed, q, 20), ops.topk_scan_both_ends(packed, q, 20, backend="cpu"))


@pytest.mark.sanitized
@pytest.mark.parametrize("queries", [1, 6])
def test_parts_side_by_side(gpu, queries):
    widths = (70, 130, 33, 100, 64, 0)
    x = [normal(70, width, seed=i) for i, width in enumerate(widths)]
    parts = [pack(x[1], "sign"), x[0], x[2].half(), pack(x[3], "int4"), pack(x[4], "int8"), x[5]]
    q, base = normal(queries, sum(widths), seed=9), normal(queries, 70, seed=10)
    base[0, 3] = torch.nan
    more = {"base": base, "valid": torch.arange(70) % 7 != 0}
    got = both_ends(gpu, parts, q, 80, **more)
    wanted = ops.topk_scan_both_ends(parts, q, 80, **more, backend="cpu")
    assert 3 not in got[1][0].tolist()
    for scores in (0, 2):
        assert torch.equal(got[scores].isnan(), wanted[scores].isnan())
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", [*FLOATS, "parts"])
def test_blocks_with_scales(gpu, kind):
    x = normal(60, 300)
    cache = [pack(x[:, :150], "int4"), pack(x[:, 150:], "sign")] if kind == "parts" else x.to(kind)
    q = normal(3, 300, seed=1)
    offsets = [0, 10, 10, 170, 300]  # one of them empty
    scales = normal(60, 9, seed=2)[:, 1:9:2]
    more = {"scales": scales, "offsets": offsets}
    got = both_ends(gpu, cache, q, 60, **more)
    wanted = ops.topk_scan_both_ends(cache, q, 60, **more, backend="reference")
    for scores in (0, 2):
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=1e-4)
    if kind != "parts":
        assert_near(got, wanted, cache, q, more)


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("dtype", PACKED)
def test_packed_rows_with_blocks(gpu, dtype, queries):
    """Edges that cut through planes and bytes, blocks shorter and longer than a plane, many stages."""
    width = 150 if gpu == "triton" else 5000 if dtype == "sign" and queries == 2 else 700
    packed = pack(normal(41, width), dtype)
    memory = torch.full((41, packed.codes.shape[1] + 5), 90, dtype=torch.uint8).view(packed.codes.dtype)
    memory[:, 3:-2] = packed.codes  # rows that begin at any byte
    packed = Packed(memory[:, 3:-2], dtype, width, packed.scale.half() if queries == 1 else packed.scale)
    some = sorted({0, 1, 64, 65, 128, 130, width, *range(150, width, 23 if width > 700 else 90)})
    offsets = [0, *some[1:5], *some[4:]]  # one of them empty
    scales, q = normal(41, len(offsets) - 1, seed=2), normal(queries, width, seed=1) * 1e-3
    scales[5, 3], scales[7, 3], scales[9, 3] = 0.0, torch.nan, torch.inf
    more = {"scales": scales, "offsets": offsets}
    got = both_ends(gpu, packed, q, 41, **more)
    wanted = ops.topk_scan_both_ends(packed, q, 41, **more, backend="reference")
    assert bool((got[1] >= 0).sum(1).eq(40).all())
    assert bool((got[0].isinf() == wanted[0].isinf()).all())
    finite = ~wanted[0].isinf() & ~wanted[0].isnan()
    size = float(wanted[0][finite].abs().max())
    for scores in (0, 2):
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=2e-6 * size, equal_nan=True)


def test_packed_parts_without_numbers_and_blocks(gpu):
    parts = [pack(normal(9, 0), "sign"), pack(normal(9, 50), "int4"), pack(normal(9, 0), "int8")]
    more = {"scales": normal(9, 2, seed=2), "offsets": [0, 20, 50]}
    q = normal(2, 50, seed=1)
    got = both_ends(gpu, parts, q, 9, **more)
    wanted = ops.topk_scan_both_ends(parts, q, 9, **more, backend="reference")
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-4)


def test_blocks_of_packed_rows_with_queries_that_are_not_numbers(gpu):
    packed, q = pack(normal(20, 100), "sign"), normal(4, 100, seed=1)
    q[0, 3], q[1, 50], q[2] = torch.nan, torch.inf, 0.0
    more = {"scales": normal(20, 2, seed=2), "offsets": [0, 40, 100]}
    got = both_ends(gpu, packed, q, 20, **more)
    wanted = ops.topk_scan_both_ends(packed, q, 20, **more, backend="reference")
    for scores in (0, 2):
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=1e-4, equal_nan=True)
    assert bool((got[1][0] == -1).all())
    assert bool(got[0][1].isinf().all())


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_must_not_be_returned(gpu, dtype, queries):
    cache, q = case(80, 40, queries, dtype)
    cache[3, 7] = torch.nan
    cache[30:50] = torch.nan
    cache[70, 0], cache[71, 0], q[:, 0] = torch.inf, -torch.inf, 1.0
    q[queries - 1, 5] = torch.inf if queries > 1 else 1.0
    valid = torch.arange(80) % 3 != 0
    got = both_ends(gpu, cache, q, 80, valid=valid)
    assert_same(got, ops.topk_scan_both_ends(cache, q, 80, valid=valid, backend="reference"))
    assert got[1][0, 0] == 70
    assert got[0][0, 0] == torch.inf
    assert torch.equal(got[0].isnan(), got[1] == -1)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_a_gpu_makes_of_nan(gpu, dtype, queries):
    """All of its bits are set, of either sign: rounded as a number it would become zero."""
    cache, q = case(40, 70, queries, dtype)
    bits = cache.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[5, 3], bits[6, 69] = torch.iinfo(bits.dtype).max, -1
    got = both_ends(gpu, cache, q, 40)
    assert not torch.isin(got[1], torch.tensor([5, 6])).any()
    assert_same(got, ops.topk_scan_both_ends(cache, q, 40, backend="reference"))


def test_sums_that_float32_does_not_hold(gpu):
    cache = torch.tensor([[3e38, 3e38, -3e38], [1.0, 2.0, 3.0], [3e38, 3e38, 3e38]])
    for queries in (1, 5):
        q = torch.tensor([[1.0, 1.0, 1.5]]).repeat(queries, 1)
        got = both_ends(gpu, cache, q, 3)
        assert_same(got[1::2], ops.topk_scan_both_ends(cache, q, 3, backend="reference")[1::2])


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float16, "sign"])
@pytest.mark.parametrize(("rows", "queries"), [(0, 2), (2, 0), (0, 0), (1, 2)])
def test_nothing_to_scan(gpu, rows, queries, dtype):
    cache, q = case(rows, 9, queries, dtype)
    for k in (0, 2):
        assert_same(both_ends(gpu, cache, q, k), ops.topk_scan_both_ends(cache, q, k, backend="reference"))


def test_no_width(gpu):
    cache, q, base = torch.zeros(5, 0), torch.zeros(2, 0), integers(2, 5)
    wanted = ops.topk_scan_both_ends(cache, q, 3, base=base, backend="reference")
    assert_same(both_ends(gpu, cache, q, 3, base=base), wanted)


@pytest.mark.sanitized
@pytest.mark.parametrize("k", [100, 1024, 1200])
def test_many_hits_of_rising_falling_and_equal_scores(gpu, k):
    """Lists that fill, and more hits than one pass finds."""
    rising = torch.arange(k + 70).float()
    cache, q = torch.stack([rising, rising % 7], 1), torch.eye(2)
    wanted = ops.topk_scan_both_ends(cache, q, k, backend="reference")
    assert_same(both_ends(gpu, cache, q, k), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, "int8"])
def test_the_same_bits_again(gpu, request, dtype):
    """Again, in any order of a block's threads, and for a query by itself."""
    x, q = normal(300, 90), normal(6, 90, seed=1)
    cache = pack(x, dtype) if dtype in PACKED else x.to(dtype)
    wanted = both_ends(gpu, cache, q, 20)
    extension = request.getfixturevalue("emulated_cuda") if gpu == "cuda" else None
    for order in (1, 2) if extension is not None and extension.emulated else (0, 0):
        try:
            if extension is not None and extension.emulated:
                extension.set_order(order)
            assert_same(both_ends(gpu, cache, q, 20), wanted)
        finally:
            if extension is not None and extension.emulated:
                extension.set_order(0)


@pytest.mark.parametrize("dtype", [torch.float16, "int4"])
def test_chunks_of_rows(gpu, dtype, monkeypatch):
    """What is kept goes on from chunk to chunk, with numbers unpacked and sums over parts held for one."""
    monkeypatch.setattr(gpu_scan, "CHUNK_BYTES", 1)
    x, q = normal(1100, 20), normal(1, 20, seed=1)
    cache = [pack(x[:, :12], dtype) if dtype in PACKED else x[:, :12].to(dtype), x[:, 12:]]
    more = {"scales": normal(1100, 2, seed=4), "offsets": [0, 5, 20]}
    got = both_ends(gpu, cache, q, 30, **more)
    wanted = ops.topk_scan_both_ends(cache, q, 30, **more, backend="reference")
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-5)


def test_outputs_are_written_whole(gpu, monkeypatch):
    """Places without a hit are filled too: the buffers are poisoned first."""
    poisoned = []

    def empty_ranking(queries, k, device):
        size = (queries, k)
        poisoned.append(
            (torch.full(size, 123.0, device=device), torch.full(size, 123, device=device, dtype=torch.int64))
        )
        return poisoned[-1]

    monkeypatch.setattr(gpu_scan, "_empty_ranking", empty_ranking)
    scores, indices = ops.topk_scan(
        torch.full((5, 3), torch.nan, device=DEVICE), torch.ones(2, 3, device=DEVICE), 4, backend=gpu
    )
    assert bool(scores.isnan().all())
    assert bool((indices == -1).all())
    assert len(poisoned) == 1


LEAST_SHARED = 101_376  # bytes that a block may have on sm_86 and sm_89, the least of sm_80 to sm_100


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_a_block_has_the_shared_memory_that_it_asks_for(emulated_cuda, dtype, monkeypatch):
    """Of every format, number of queries, k and ends, with rows from one unit to more than a stage holds."""
    from rapidin.ops.cuda import scan

    class Quiet:
        scan_queries = staticmethod(lambda *_: None)

    monkeypatch.setattr(scan, "extension", Quiet)
    name, most = dtype if dtype in PACKED else gpu_scan._FLOATS[dtype], 0
    for width, q, blocks in product((1, 700, 40000), (1, 2, 3, 4, 5, 8, 9, 16, 17, 256), (False, True)):
        part = gpu_scan.Part(torch.empty(1, 1), name, width, 0, None)
        segments = [(0, width, 0)] if blocks else None
        made = scan.prepare(part, torch.empty(1, width).expand(q, width), segments)
        for k, ends in product((1, 256, 257, gpu_scan.LONGEST), (1, 3)):
            asked = emulated_cuda.topk_scan_shared_bytes(
                scan._FORMATS[name], made.blocks, made.tiles, made.units, made.columns_held,
                scan.capacity_of(k), ends,
            )  # fmt: skip
            assert 0 < asked <= LEAST_SHARED, (width, q, blocks, k, ends)
            most = max(most, asked)
    assert most > 48 << 10  # the largest were among them


def plain_fragments(dtype, queries, segments):
    """What the kernels of scan_queries.cuh make, by plain operations; not of packed rows with blocks."""
    sums = None
    if dtype in PACKED:
        integers, units_of, sums = gpu_scan.integer_queries(queries, dtype)
        columns = gpu_scan.integer_planes(integers, dtype)
        columns = columns[:, :, None] if dtype == "int8" else columns[:, None]
    else:
        scaled, units_of = gpu_scan.scaled_queries(queries)
        if dtype == torch.float32:
            high = ((scaled.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
            low = ((scaled - high).view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
            columns = torch.stack([high, low], 1)[:, :, None]
        elif dtype == torch.float16:
            columns = gpu_scan.float_terms(scaled, dtype, 2).transpose(0, 1)[:, :, None]
        else:
            terms = gpu_scan.float_terms(scaled, dtype, 3)
            columns = torch.stack([*terms, torch.zeros_like(terms[0])], 1)
            columns = columns.view(len(queries), 2, 2, -1).transpose(1, 2)
    unit = 64 // columns.element_size()
    places = [torch.empty(0, dtype=torch.int64)]
    for begin, end, _ in segments or [(0, columns.shape[3], 0)]:
        place = torch.arange(begin // unit * unit, -(-end // unit) * unit)
        places.append(place.where((place >= begin) & (place < end), columns.shape[3]))
    columns = torch.nn.functional.pad(columns, (0, 1))[..., torch.cat(places)]
    return columns.unflatten(3, (-1, 4, unit // 4)), units_of, sums  # [Q, columns, planes, units, 4, numbers]


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_queries_are_prepared_bit_for_bit(emulated_cuda, dtype, blocks):
    from rapidin.ops.cuda.scan import prepare

    if dtype in PACKED and blocks:
        return  # what is made of these is seen in their scores
    name = dtype if dtype in PACKED else gpu_scan._FLOATS[dtype]
    for q, width in ((1, 1), (3, 700), (9, 130), (20, 65)):
        queries = normal(q, width + 3, seed=q).to(DEVICE)[:, 1 : width + 1] * 10.0 ** (5 * (q % 9) - 20)
        queries[:, : width // 3] *= 1e-6  # numbers that leave their format's normal range when scaled
        queries[q // 2] = torch.tensor([0.0, torch.nan, 1.0])[q % 3]
        segments = [(0, width // 2, 1), (width // 2, width - width // 5, 0)] if blocks else None
        segments = segments and [s for s in segments if s[0] < s[1]]
        part = gpu_scan.Part(torch.empty(1, 1), name, width, 0, None)
        made = prepare(part, queries, segments)
        columns, units_of, sums = plain_fragments(dtype, queries.cpu(), segments)
        assert torch.equal(made.units_of.cpu().nan_to_num(-1.0), units_of.nan_to_num(-1.0))
        if sums is not None:
            assert torch.equal(made.sums.cpu(), sums)
        _, each, planes, units = columns.shape[:4]
        got = made.fragments.cpu().view(columns.dtype)
        got = got.view(made.query_tiles, units, planes, made.tiles, made.columns_held, *columns.shape[4:])
        got = got.permute(0, 3, 4, 2, 1, 5, 6).flatten(0, 2)  # [columns, planes, units, 4, numbers]
        wanted = columns.flatten(0, 1)
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[columns.element_size()]
        assert torch.equal(got[: q * each].contiguous().view(kind), wanted.contiguous().view(kind)), (
            q,
            width,
        )
        assert not bool(got[q * each :].any())


class Launches(TorchDispatchMode):
    """Counts what torch launches: all operations but views and new memory."""

    QUIET = ("empty", "view", "slice", "detach", "select", "alias")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        if name not in self.QUIET:
            self.names.append(name)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_a_scan_launches_little_besides_its_kernels(emulated_cuda, dtype, blocks, monkeypatch):
    """Queries are prepared once for scans of several shards; torch fills one table a scan."""
    from rapidin.ops.cuda import scan

    cache, q = case(20, 70, 3, dtype)
    more = {"scales": torch.ones(20, 2, device=DEVICE), "offsets": [0, 30, 70]} if blocks else {}
    cache, asked = on_device(cache), ops.ScanQueries(q.to(DEVICE))
    wanted = ops.topk_scan_both_ends(cache, asked.tensor, 5, backend="cuda", **more)
    prepared = []
    prepare = scan.prepare
    monkeypatch.setattr(scan, "prepare", lambda *of: (prepared.append(1), prepare(*of))[1])
    for _ in range(3):
        with Launches() as launches:
            found = ops.topk_scan_both_ends(cache, asked, 5, backend="cuda", **more)
        assert launches.names == ["zeros"]
        assert_same([x.cpu() for x in found], [x.cpu() for x in wanted])
    assert len(prepared) == 1


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_prepared_queries_serve_other_rows_and_blocks(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    q = normal(3, 60, seed=1)
    asked = ops.ScanQueries(q.to(DEVICE) if backend == "triton" else q)
    for seed, offsets in ((1, None), (2, [0, 20, 60]), (3, [0, 25, 60]), (4, None)):
        cache = [pack(normal(9, 40, seed=seed), "sign"), normal(9, 20, seed=seed + 9)]
        more = {} if offsets is None else {"scales": normal(9, 2, seed=seed + 5), "offsets": offsets}
        place = {n: x.to(DEVICE) if backend == "triton" and n == "scales" else x for n, x in more.items()}
        there = on_device(cache) if backend == "triton" else cache
        found = ops.topk_scan(there, asked, 4, backend=backend, **place)
        wanted = ops.topk_scan(there, asked.tensor, 4, backend=backend, **place)
        assert_same([x.cpu() for x in found], [x.cpu() for x in wanted])


def test_more_rows_than_a_key_can_name(gpu):
    cache = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1)
    with pytest.raises(ValueError, match="2147483647 rows at most"):
        ops.topk_scan(cache, torch.ones(1, 1, device=DEVICE), 1, backend=gpu)
