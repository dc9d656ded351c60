"""topk_scan: every instruction set and GPU kernel against the reference, ties, what is never
returned, same bits."""

import itertools
from dataclasses import replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from changed import changed
from hypothesis import given
from hypothesis import strategies as st
from inputs import DEVICE, INSTRUCTION_SETS, instruction_set, integers, normal, torch_threads
from poison import poisoned
from properties import tries
from torch.utils._python_dispatch import TorchDispatchMode

from rapidin import ops
from rapidin.ops import Packed, _cpu, cuda, gpu_scan, pack, packed_bytes

CACHE_DTYPES = (torch.float32, torch.float16)
SHAPES = ((1, 1), (7, 3), (101, 64), (50, 1037), (97, 2050))


def exact_case(rows, width, queries, seed=0):
    """Integers: scores are exact, and many are equal."""
    return integers(rows, width, seed=seed, size=2), integers(queries, width, seed=seed + 1, size=2)


def assert_same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(0.0, 1e38, -1e38), y.nan_to_num(0.0, 1e38, -1e38))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 9])
def test_exact_scores_and_ties(queries, dtype, name):
    for rows, width in SHAPES:
        cache, q = exact_case(rows, width, queries)
        cache = cache.to(dtype)
        for k in (0, 1, 10, rows, rows + 5):
            wanted = ops.topk_scan_both_ends(cache, q, k, backend="reference")
            with instruction_set(name):
                assert_same(ops.topk_scan_both_ends(cache, q, k, backend="cpu"), wanted)
                assert_same(ops.topk_scan(cache, q, k), wanted[:2])
                assert_same(ops.topk_scan(cache, q, k, largest=False), wanted[2:])
            assert wanted[0].shape == (queries, min(k, rows))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("queries", [1, 6])
def test_scores_of_blocks_with_scales(queries, dtype, name):
    cache, q = normal(60, 1500).to(dtype), normal(queries, 1500, seed=1)
    offsets = [0, 10, 10, 1100, 1500]  # one of them empty
    scales = normal(60, 9, seed=2)[:, 1:9:2]  # of rows further apart than their length
    wanted = ops.topk_scan_both_ends(cache, q, 60, scales=scales, offsets=offsets, backend="reference")
    with instruction_set(name):
        got = ops.topk_scan_both_ends(cache, q, 60, scales=scales, offsets=offsets)
    for scores in (0, 2):
        torch.testing.assert_close(got[scores], wanted[scores], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            got[scores].sort().values, wanted[scores].sort().values, rtol=1e-5, atol=1e-4
        )
    per_block = torch.stack(
        [
            (q[:, a:b].double() @ cache[:, a:b].double().T) * scales[:, i].double()
            for i, (a, b) in enumerate(itertools.pairwise(offsets))
        ]
    ).sum(0)
    for j in range(queries):
        torch.testing.assert_close(got[0][j].double(), per_block[j, got[1][j]], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_what_must_not_be_returned(dtype, name):
    cache, q = exact_case(120, 40, 5)
    cache = cache.to(dtype)
    cache[3, 7] = torch.nan
    cache[50:100] = torch.nan
    cache[110, 0], q[:, 0] = torch.inf, 1.0
    cache[111, 0] = -torch.inf
    q[4] = torch.nan
    valid = torch.ones(120, dtype=torch.bool)
    valid[::3] = False
    with instruction_set(name):
        got = ops.topk_scan_both_ends(cache, q, 120, valid=valid, backend="cpu")
    assert_same(got, ops.topk_scan_both_ends(cache, q, 120, valid=valid, backend="reference"))
    top, indices, bottom, bottom_indices = got
    usable = {i for i in range(120) if i % 3 and i != 3 and not 50 <= i < 100}
    assert set(indices[0].tolist()) == usable | {-1}
    assert top[0, 0] == torch.inf
    assert indices[0, 0] == 110
    assert bottom[0, 0] == bottom[0, :1].min()
    assert bool((indices[4] == -1).all())
    assert bool(top[4].isnan().all())
    assert torch.equal(top.isnan(), indices == -1)
    assert torch.equal(bottom.isnan(), bottom_indices == -1)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_threads_and_neighbours_change_no_bit(dtype, name):
    cache, q = normal(203, 1234).to(dtype), normal(9, 1234, seed=1)
    with instruction_set(name):
        whole = ops.topk_scan(cache, q, 203)
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert_same(ops.topk_scan(cache, q, 203), whole)
        for j in range(9):  # by itself, and in threes
            assert_same(ops.topk_scan(cache, q[j : j + 1], 203), (whole[0][j : j + 1], whole[1][j : j + 1]))
        assert_same(ops.topk_scan(cache, q[3:6], 203), (whole[0][3:6], whole[1][3:6]))
        for first in (1, 5, 60):  # rows in other blocks
            scores, indices = ops.topk_scan(cache[first:], q, 203)
            for j in range(9):
                of_row = dict(zip(whole[1][j].tolist(), whole[0][j].tolist(), strict=True))
                assert scores[j].tolist() == [of_row[i + first] for i in indices[j].tolist()]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_float16(name):
    """All 65,536 halves, subnormals and infinities among them, are what torch takes them for."""
    cache = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[:, None]
    with instruction_set(name):
        for queries in (1, 5):  # read in place, and converted first
            scores, indices = ops.topk_scan(cache, torch.ones(queries, 1), len(cache))
            there = indices[0] >= 0
            assert int(there.sum()) == int((~cache.isnan()).sum())
            assert torch.equal(scores[0][there], cache.float()[indices[0][there], 0])


def test_rows_of_a_read_only_memory_map(tmp_path):
    table = integers(40, 30).half().numpy()
    np.save(tmp_path / "rows.npy", table)
    with pytest.warns(UserWarning, match="not writable"):
        cache = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    q = integers(2, 20, seed=3)
    assert_same(ops.topk_scan(cache[:, 5:25], q, 7), ops.topk_scan(cache[:, 5:25], q, 7, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("rows", "queries", "width"), [(0, 2, 3), (2, 0, 3), (2, 2, 0), (0, 0, 0)])
def test_nothing_to_scan(rows, queries, width, backend):
    scores, indices = ops.topk_scan(torch.zeros(rows, width), torch.zeros(queries, width), 2, backend=backend)
    assert scores.shape == indices.shape == (queries, min(2, rows))
    assert torch.equal(scores, torch.zeros_like(scores))


def ranked_scores(cache, queries, scored, **more):
    """What `scores` is filled with, by a ranking of all rows."""
    n = len(more["valid"])
    found, rows = ops.topk_scan(cache, queries, n, **more)
    return torch.full((len(queries), n + 1), torch.nan).scatter_(1, rows % (n + 1), found)[:scored, :n]


def scattered(scored, rows):
    """Memory for scores, spoilt, and rows of it further apart than they are long."""
    return torch.full((scored, rows + 3), 7.0)[:, 1 : rows + 1]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(("queries", "scored"), [(1, 1), (5, 2), (3, 0)])
@pytest.mark.parametrize("kind", ["float32", "parts", "blocks"])
def test_all_scores_beside_the_ranking(kind, queries, scored, name):
    x, q = normal(203, 300), normal(queries, 300, seed=1)
    cache, more = x, {"valid": torch.arange(203) % 5 != 0}
    if kind == "parts":
        cache = [pack(x[:, :130], "sign"), x[:, 130:200].half(), pack(x[:, 200:], "int8")]
        more["base"] = normal(queries, 203, seed=2)
        more["base"][0, 3] = torch.nan
    if kind == "blocks":
        more |= {"scales": normal(203, 2, seed=3), "offsets": [0, 70, 300]}
    more["valid"][64:128] = False  # more rows at a stretch than are scored at once
    kept = scattered(scored, 203)
    with instruction_set(name):
        wanted = ops.topk_scan_both_ends(cache, q, 9, **more)
        assert_same(ops.topk_scan_both_ends(cache, q, 9, scores=kept, **more), wanted)
        assert_same([kept], [ranked_scores(cache, q, scored, **more)])
    by_reference = scattered(scored, 203)
    ops.topk_scan_both_ends(cache, q, 0, scores=by_reference, backend="reference", **more)
    torch.testing.assert_close(
        by_reference, kept, rtol=1e-4, atol=1.0 if kind == "parts" else 1e-4, equal_nan=True
    )


@tries(30)
@given(
    rows=st.integers(1, 120),
    width=st.integers(1, 60),
    queries=st.integers(1, 7),
    k=st.integers(0, 130),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(rows, width, queries, k, seed):
    cache, q = exact_case(rows, width, queries, seed)
    valid = integers(rows, seed=seed) > -2
    got = ops.topk_scan_both_ends(cache, q, k, valid=valid)
    assert_same(got, ops.topk_scan_both_ends(cache, q, k, valid=valid, backend="reference"))


def test_outputs_are_written_whole():
    """Places without a hit are filled too."""
    cache = torch.tensor([[torch.nan], [2.0], [torch.nan]]).expand(3, 3)
    with poisoned() as given:
        scores, indices = ops.topk_scan(cache, torch.ones(2, 3), 3)
    assert scores.nan_to_num(-1).tolist() == [[6.0, -1.0, -1.0]] * 2
    assert indices.tolist() == [[1, -1, -1]] * 2
    assert any(x.data_ptr() == scores.data_ptr() for x in given)
    with poisoned():
        scores, indices = ops.topk_scan(torch.full((5, 3), torch.nan), torch.ones(2, 3), 4)
    assert bool(scores.isnan().all())
    assert bool((indices == -1).all())


CACHE, QUERIES = torch.zeros(4, 6), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": QUERIES[:, :5]}, ValueError, "cache's width"),
        ({"queries": QUERIES.half()}, TypeError, "queries must be float32"),
        ({"cache": CACHE.double()}, TypeError, "cache must be float32, float16, bfloat16"),
        ({"cache": CACHE.bfloat16()}, TypeError, "backend 'cpu' takes float32 and float16"),
        ({"k": -1}, ValueError, "k must not be negative"),
        ({"k": 1.5}, TypeError, "k must be an int"),
        ({"offsets": [0, 6]}, ValueError, "go together, got only offsets"),
        ({"scales": torch.ones(4, 1)}, ValueError, "go together, got only scales"),
        ({"scales": torch.ones(4, 1), "offsets": [0, 5]}, ValueError, "ascend from 0 to the cache's width 6"),
        ({"scales": torch.ones(4, 3), "offsets": [0, 5, 4, 6]}, ValueError, "ascend"),
        ({"scales": torch.ones(4, 1), "offsets": [0, 3, 6]}, ValueError, r"scales must be \[N, blocks\]"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, "each of the 4 rows"),
        ({"valid": torch.ones(4)}, TypeError, "valid must be bool"),
    ],
)
def test_mistakes_are_named(changes, error, words):
    with pytest.raises(error, match=words):
        ops.topk_scan(**{"cache": CACHE, "queries": QUERIES, "k": 2, **changes})


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (torch.ones(3, 4), ValueError, "S <= 2 and N = 4"),
        (torch.ones(2, 5), ValueError, "S <= 2 and N = 4"),
        (torch.ones(4, 2).T, ValueError, "neighbours in memory"),
        (torch.ones(2, 4).double(), TypeError, "scores must be float32"),
        (torch.ones(4), ValueError, "scores must have 2 axes"),
    ],
)
def test_memory_for_scores_is_checked(scores, error, words):
    with pytest.raises(error, match=words):
        ops.topk_scan_both_ends(CACHE, QUERIES, 2, scores=scores)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _cpu.use_set("sse9")
    assert _cpu.current_set() == INSTRUCTION_SETS[-1]


# ---- on GPUs: Triton's kernels and CUDA's, which run on the CPU where there is no GPU ----


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(SMALL_SHAPES, EVERY), *product(LARGE_SHAPES, LARGE)], ids=str
)
def test_exact_scores_and_ties_on_gpus(gpu, shape, dtype):
    rows, width, queries, k, gap = shape
    cache, q = case(rows, width, queries, dtype, gap=gap)
    wanted = ops.topk_scan_both_ends(cache, q, k, backend="reference")
    assert_same(both_ends(gpu, cache, q, k), wanted)


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EVERY if DEVICE.type == "cuda" else (torch.float16, "int4"))
def test_both_ends_are_two_scans(gpu, dtype):
    cache, q = case(90, 40, 5, dtype, seed=3)
    got = both_ends(gpu, cache, q, 7)
    for largest, wanted in ((True, got[:2]), (False, got[2:])):
        found = ops.topk_scan(on_device(cache), q.to(DEVICE), 7, largest=largest, backend=gpu)
        assert_same([x.cpu() for x in found], wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind",
    [torch.float16, *(pytest.param(kind, marks=pytest.mark.full) for kind in ("sign", "parts"))],
    ids=str,
)
def test_all_scores_beside_the_ranking_on_gpus(gpu, kind):
    """More rows than are scored at a time, in memory that is spoilt before."""
    rows, width, queries, scored = 300, 40, 3, 2
    if kind == "parts":
        cache = [case(rows, width, queries, d)[0] for d in (torch.float32, "int4")]
        cache[1] = replace(cache[1], scale=2.0 ** (torch.arange(rows) % 3))  # so that scores stay exact
        q = torch.cat([case(rows, width, queries, d)[1] for d in (torch.float32, "int4")], 1)
    else:
        cache, q = case(rows, width, queries, kind)
    more = {"valid": torch.arange(rows) % 7 != 0, "base": integers(queries, rows, seed=5)}
    kept = scattered(scored, rows).to(DEVICE)
    given = ops.ScanQueries(q.to(DEVICE))
    there = {name: on_device(x) for name, x in more.items()}
    for _ in range(2):  # the second time with the queries as they were prepared
        found = ops.topk_scan_both_ends(on_device(cache), given, 9, scores=kept, backend=gpu, **there)
        assert_same([x.cpu() for x in found], both_ends(gpu, cache, q, 9, **more))
        assert_same([kept.cpu()], [ranked_scores(cache, q, scored, **more)])
        kept.fill_(7.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [1, 6])
def test_scores_are_near(gpu, queries, dtype):
    cache, q = normal(120, 1100).to(dtype), normal(queries, 1100, seed=1) * 1e-3
    wanted = ops.topk_scan_both_ends(cache, q, 11, backend="reference")
    assert_near(both_ends(gpu, cache, q, 11), wanted, cache, q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("queries", [1, 9])
def test_packed_rows_have_the_bits_of_the_cpu(gpu, queries, dtype):
    packed, q = pack(normal(40, 700), dtype), normal(queries, 700, seed=1)
    packed = Packed(packed.codes, dtype, 700, packed.scale.half() if queries == 1 else packed.scale)
    base = normal(queries, 40, seed=2)
    q[0, 3] = torch.nan if queries > 1 else 0.5
    got = both_ends(gpu, packed, q, 40, base=base)
    assert_same(got, ops.topk_scan_both_ends(packed, q, 40, base=base, backend="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", PACKED)
def test_queries_halfway_between_integers_have_the_bits_of_the_cpu(gpu, dtype):
    """73 of 146 is 63.5 of 127: by a reciprocal of 146 it would be less. So is 2,052 of 4,104."""
    packed, q = Packed(codes(20, 200, dtype), dtype, 200, None), normal(2, 200, seed=1).round()
    q[0, :3], q[1, :3] = torch.tensor([146.0, 73.0, -73.0]), torch.tensor([4104.0, 2052.0, -2052.0])
    assert_same(both_ends(gpu, packed, q, 20), ops.topk_scan_both_ends(packed, q, 20, backend="cpu"))


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_packed_parts_without_numbers_and_blocks(gpu):
    parts = [pack(normal(9, 0), "sign"), pack(normal(9, 50), "int4"), pack(normal(9, 0), "int8")]
    more = {"scales": normal(9, 2, seed=2), "offsets": [0, 20, 50]}
    q = normal(2, 50, seed=1)
    got = both_ends(gpu, parts, q, 9, **more)
    wanted = ops.topk_scan_both_ends(parts, q, 9, **more, backend="reference")
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_must_not_be_returned_on_gpus(gpu, dtype, queries):
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_sums_that_float32_does_not_hold(gpu):
    cache = torch.tensor([[3e38, 3e38, -3e38], [1.0, 2.0, 3.0], [3e38, 3e38, 3e38]])
    for queries in (1, 5):
        q = torch.tensor([[1.0, 1.0, 1.5]]).repeat(queries, 1)
        got = both_ends(gpu, cache, q, 3)
        assert_same(got[1::2], ops.topk_scan_both_ends(cache, q, 3, backend="reference")[1::2])


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float16, "sign"])
@pytest.mark.parametrize(("rows", "queries"), [(0, 2), (2, 0), (0, 0), (1, 2)])
def test_nothing_to_scan_on_gpus(gpu, rows, queries, dtype):
    cache, q = case(rows, 9, queries, dtype)
    for k in (0, 2):
        assert_same(both_ends(gpu, cache, q, k), ops.topk_scan_both_ends(cache, q, k, backend="reference"))


@pytest.mark.gpu
def test_no_width(gpu):
    cache, q, base = torch.zeros(5, 0), torch.zeros(2, 0), integers(2, 5)
    wanted = ops.topk_scan_both_ends(cache, q, 3, base=base, backend="reference")
    assert_same(both_ends(gpu, cache, q, 3, base=base), wanted)


@pytest.mark.gpu
@pytest.mark.sanitized
@pytest.mark.parametrize("k", [100, *(pytest.param(k, marks=pytest.mark.full) for k in (1024, 1200))])
def test_many_hits_of_rising_falling_and_equal_scores(gpu, k):
    """Lists that fill, and more hits than one pass finds."""
    rising = torch.arange(k + 70).float()
    cache, q = torch.stack([rising, rising % 7], 1), torch.eye(2)
    wanted = ops.topk_scan_both_ends(cache, q, k, backend="reference")
    assert_same(both_ends(gpu, cache, q, k), wanted)


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, "int4"])
def test_chunks_of_rows(gpu, dtype):
    """What is kept goes on from chunk to chunk, with numbers unpacked and sums over parts held for one."""
    kernels = import_module(f"rapidin.ops.{gpu}.scan").ScanKernels()
    _, both_ends_in_chunks = gpu_scan.ops(kernels, chunk_bytes=1)
    x, q = normal(1100, 20), normal(1, 20, seed=1)
    cache = [pack(x[:, :12], dtype) if dtype in PACKED else x[:, :12].to(dtype), x[:, 12:]]
    more = {"scales": normal(1100, 2, seed=4), "offsets": [0, 5, 20]}
    there = {"scales": more["scales"].to(DEVICE), "offsets": more["offsets"], "valid": None, "base": None}
    got = [x.cpu() for x in both_ends_in_chunks(on_device(cache), q.to(DEVICE), 30, **there)]
    wanted = ops.topk_scan_both_ends(cache, q, 30, **more, backend="reference")
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_outputs_are_written_whole_on_gpus(gpu):
    """Places without a hit are filled too."""
    cache = torch.full((5, 3), torch.nan, device=DEVICE)
    with poisoned() as given:
        scores, indices = ops.topk_scan(cache, torch.ones(2, 3, device=DEVICE), 4, backend=gpu)
    assert bool(scores.isnan().all())
    assert bool((indices == -1).all())
    assert {scores.data_ptr(), indices.data_ptr()} <= {x.data_ptr() for x in given}


LEAST_SHARED = 101_376  # bytes that a block may have on sm_86 and sm_89, the least of sm_80 to sm_100


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_a_block_has_the_shared_memory_that_it_asks_for(emulated_cuda, dtype):
    """Of every format, number of queries, k and ends, with rows from one unit to more than a stage holds."""
    from rapidin.ops.cuda import scan

    quiet = changed(emulated_cuda, scan_queries=lambda *_: None)
    name, most = dtype if dtype in PACKED else gpu_scan._FLOATS[dtype], 0
    for width, q, blocks in product((1, 700, 40000), (1, 2, 3, 4, 5, 8, 9, 16, 17, 256), (False, True)):
        part = gpu_scan.Part(torch.empty(1, 1), name, width, 0, None)
        segments = [(0, width, 0)] if blocks else None
        with cuda.using(quiet):
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


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_a_scan_launches_little_besides_its_kernels(emulated_cuda, dtype, blocks):
    """Queries are prepared once for scans of several shards; torch fills one table a scan."""
    cache, q = case(20, 70, 3, dtype)
    more = {"scales": torch.ones(20, 2, device=DEVICE), "offsets": [0, 30, 70]} if blocks else {}
    cache, asked = on_device(cache), ops.ScanQueries(q.to(DEVICE))
    wanted = ops.topk_scan_both_ends(cache, asked.tensor, 5, backend="cuda", **more)
    prepared = []

    def prepare(*given):
        prepared.append(given)
        return emulated_cuda.scan_queries(*given)

    for _ in range(3):
        with Launches() as launches, cuda.using(changed(emulated_cuda, scan_queries=prepare)):
            found = ops.topk_scan_both_ends(cache, asked, 5, backend="cuda", **more)
        assert launches.names == ["zeros"]
        assert_same([x.cpu() for x in found], [x.cpu() for x in wanted])
    assert len(prepared) == 1


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_more_rows_than_a_key_can_name(gpu):
    cache = torch.zeros(1, 1, device=DEVICE).expand(2**31, 1)
    with pytest.raises(ValueError, match="2147483647 rows at most"):
        ops.topk_scan(cache, torch.ones(1, 1, device=DEVICE), 1, backend=gpu)
