"""topk_scan: every instruction set against the reference, ties, what is never returned, same bits."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import INSTRUCTION_SETS, instruction_set, integers, normal, torch_threads

from rapidin import ops
from rapidin.ops import _cpu, cpu

CACHE_DTYPES = (torch.float32, torch.float16)
SHAPES = ((1, 1), (7, 3), (101, 64), (50, 1037), (97, 2050))


def exact_case(rows, width, queries, seed=0):
    """Integers: scores are exact, and many are equal."""
    return integers(rows, width, seed=seed, size=2), integers(queries, width, seed=seed + 1, size=2)


def assert_same(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
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


@settings(max_examples=30, deadline=None)
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


def test_outputs_are_written_whole(monkeypatch):
    """Places without a hit are filled too: the buffers are poisoned first."""
    poisoned = []

    def empty_ranking(queries, k, filled):
        size = (queries, k) if filled else (0, 0)
        poisoned.append((torch.full(size, 123.0), torch.full(size, 123)))
        return poisoned[-1]

    monkeypatch.setattr(cpu, "_empty_ranking", empty_ranking)
    scores, indices = ops.topk_scan(torch.full((5, 3), torch.nan), torch.ones(2, 3), 4)
    assert bool(scores.isnan().all())
    assert bool((indices == -1).all())
    assert len(poisoned) == 2


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


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _cpu.use_set("sse9")
    assert _cpu.current_set() == INSTRUCTION_SETS[-1]
