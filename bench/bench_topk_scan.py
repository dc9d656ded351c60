"""topk_scan against reading the cache once, and beside what else scans one: torch in chunks, numpy, faiss.

pytest bench/bench_topk_scan.py --benchmark-json=topk_scan.json

One group for each dtype of the cache and number of queries, the cache several times the size of the
processor's last cache. faiss (pip install faiss-cpu) is left out where it is not installed. With
RAPIDIN_BENCH_QUICK=1 everything is small, for a run of seconds that shows no more than that the file works.
"""

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from limits import note, read_seconds
from torch import Tensor

from rapidin import ops
from rapidin.ops import Packed

QUICK = os.environ.get("RAPIDIN_BENCH_QUICK") == "1"
CACHE_BYTES = (1 << 20) if QUICK else (512 << 20)
ROW_BYTES = 2048
NUMBERS = {"float16": 0.5, "int8": 1, "int4": 2, "sign": 8}  # a byte
K, CHUNK = 10, 1024

Rows = Tensor | Packed
Search = Callable[[np.ndarray], Any]


@cache
def rows_of(dtype: str) -> Rows:
    """Random codes: what they are does not matter to the time."""
    generator = torch.Generator().manual_seed(0)
    n, width = CACHE_BYTES // ROW_BYTES, int(ROW_BYTES * NUMBERS[dtype])
    if dtype == "float16":
        return torch.randn(n, width, generator=generator).half()
    codes = torch.randint(0, 256, (n, ROW_BYTES), generator=generator, dtype=torch.uint8)
    return Packed(codes.view(torch.int8) if dtype == "int8" else codes, dtype, width, torch.ones(n))


def chunk_of(rows: Rows, begin: int) -> Tensor:
    """Some rows as float32."""
    if isinstance(rows, Tensor):
        return rows[begin : begin + CHUNK].float()
    few = slice(begin, begin + CHUNK)
    return ops.unpack(Packed(rows.codes[few], rows.dtype, rows.width, rows.scale[few]))


def rapidin_search(rows: Rows) -> Search:
    return lambda q: ops.topk_scan(rows, torch.from_numpy(q), K)


def torch_search(rows: Rows) -> Search:
    """What a user would write: the scores of some rows at a time, then topk of all."""
    n = CACHE_BYTES // ROW_BYTES

    def search(q: np.ndarray) -> Any:
        query = torch.from_numpy(q)
        scores = [query @ chunk_of(rows, begin).T for begin in range(0, n, CHUNK)]
        return torch.topk(torch.cat(scores, dim=1), K)

    return search


def numpy_search(rows: Rows) -> Search:
    n = CACHE_BYTES // ROW_BYTES

    def search(q: np.ndarray) -> Any:
        scores = np.concatenate([q @ chunk_of(rows, begin).numpy().T for begin in range(0, n, CHUNK)], axis=1)
        found = np.argpartition(-scores, K, axis=1)[:, :K]
        return np.take_along_axis(scores, found, 1), found

    return search


def faiss_searches(rows: Rows, *, all_kinds: bool = True) -> dict[str, Search]:
    """The indices of faiss that store these rows in as many bytes, by name; none where it is not installed.
    all_kinds: not only the first one, whose answers are the nearest to ours."""
    try:
        import faiss
    except ImportError:
        return {}
    width = rows.width if isinstance(rows, Packed) else rows.shape[1]
    kind = rows.dtype if isinstance(rows, Packed) else "float16"
    types, product = faiss.ScalarQuantizer, faiss.METRIC_INNER_PRODUCT
    made: dict[str, Callable[[], Any]] = {}
    if kind == "sign":
        for name in ("IndexRaBitQ", "IndexRaBitQFastScan"):
            if hasattr(faiss, name):
                made[f"faiss {name}"] = partial(getattr(faiss, name), width, product)
        made["faiss IndexPQFastScan, 4 numbers a code"] = lambda: faiss.IndexPQFastScan(
            width, width // 4, 4, product
        )
    else:
        quantizer = {"float16": types.QT_fp16, "int8": types.QT_8bit, "int4": types.QT_4bit}[kind]
        made[f"faiss IndexScalarQuantizer, {kind}"] = lambda: faiss.IndexScalarQuantizer(
            width, quantizer, product
        )
        if kind == "int4":
            made["faiss IndexPQFastScan, a number a code"] = lambda: faiss.IndexPQFastScan(
                width, width, 4, product
            )
    faiss.omp_set_num_threads(torch.get_num_threads())
    some = chunk_of(rows, 0).numpy()  # again and again: adding is slow, and not what is measured
    searches: dict[str, Search] = {}
    for name in list(made)[: None if all_kinds else 1]:
        index = made[name]()
        index.train(some)
        while index.ntotal < CACHE_BYTES // ROW_BYTES:
            index.add(some)
        searches[name] = lambda q, index=index: index.search(q, K)  # type: ignore[misc]
    if kind == "sign" and all_kinds:  # the query is cut to signs too, so that its answers are others
        binary = faiss.IndexBinaryFlat(width)
        binary.add(rows.codes.numpy())
        searches["faiss IndexBinaryFlat, queries of signs"] = lambda q: binary.search(
            np.packbits(q > 0, axis=1), K
        )
    return searches


def faiss_search(rows: Rows) -> Search:
    searches = faiss_searches(rows, all_kinds=False)
    if not searches:
        pytest.skip("faiss is not installed")
    return next(iter(searches.values()))


WAYS = {"rapidin": rapidin_search, "torch": torch_search, "numpy": numpy_search, "faiss": faiss_search}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("queries", [1, 8, 64])
@pytest.mark.parametrize("dtype", NUMBERS)
def bench_topk_scan(benchmark, dtype, queries, way):
    benchmark.group = f"{dtype}, queries: {queries}"
    rows = rows_of(dtype)
    stored = rows.codes if isinstance(rows, Packed) else rows
    width = int(ROW_BYTES * NUMBERS[dtype])
    q = torch.randn(queries, width, generator=torch.Generator().manual_seed(1)).numpy()
    search = WAYS[way](rows)
    limit = read_seconds(stored, 0.1 if QUICK else 1.0)
    benchmark.pedantic(search, (q,), rounds=2 if QUICK else 7, warmup_rounds=1)
    best = benchmark.stats.stats.min
    note(
        benchmark,
        gb_per_s=stored.nbytes / best / 1e9,
        of_read_loop=limit / best,
        gflop_per_s=2 * queries * len(stored) * width / best / 1e9,
    )


@pytest.mark.parametrize("dtype", ["int8", "int4", "sign"])
def bench_pack(benchmark, dtype):
    """Rows of 16,384 float32 to codes, against reading them once."""
    benchmark.group = "pack"
    x = torch.randn(64 if QUICK else 4096, 16384, generator=torch.Generator().manual_seed(0))
    limit = read_seconds(x, 0.1 if QUICK else 1.0)
    benchmark.pedantic(ops.pack, (x, dtype), rounds=2 if QUICK else 7, warmup_rounds=1)
    best = benchmark.stats.stats.min
    note(benchmark, gb_per_s=x.nbytes / best / 1e9, of_read_loop=limit / best)
