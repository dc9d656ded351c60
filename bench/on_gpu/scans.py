"""topk_scan of caches in the GPU's memory, and what comes over the bus for those that are larger."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made_cache import write_cache
from torch import Tensor

from on_gpu import peers
from on_gpu.cases import BACKENDS, Bench, Case, Cost, Facts, Mode
from rapidin import ops
from rapidin.ops import Packed
from rapidin.reference.packed import decoded

# dtype, numbers of a row: rows of 2,000 bytes in each dtype, and RapidIn's own 65,536 numbers
ROWS = (("sign", 16000), ("float16", 65536), ("int8", 2000), ("float16", 1000), ("int4", 4000))
NUMBERS = {"float16": 0.5, "int8": 1, "int4": 2, "sign": 8}  # a byte
QUERIES = (1, 16, 4, 64, 256)
PEER_QUERIES = (1, 64)  # the others' time hardly depends on them, and is most of what the stage takes
GOAL, GOAL_QUERIES = 0.85, 16
# Of the scores' root mean square: queries are rounded to steps for packed rows (rapidin.ops.topk_scan).
TOLERANCES = {"float16": 5e-3, "int8": 1e-2, "int4": 0.1, "sign": 0.1}


def scan_sizes(mode: Mode) -> list[dict[str, Any]]:
    if mode == "dry":
        return [
            {"dtype": d, "numbers": n, "queries": q, "k": k}
            for d, n, q, k in (
                ("sign", 144, 1, 5),
                ("float16", 70, 2, 5),
                ("int8", 80, 2, 5),
                ("int4", 72, 1, 5),
            )
        ]
    pairs = [(q, 10) for q in QUERIES] + [(1, 100), (64, 100)]
    if mode == "quick":
        pairs = [(1, 10), (16, 10)]
    return [{"dtype": d, "numbers": n, "queries": q, "k": k} for d, n in ROWS for q, k in pairs]


def _cache(bench: Bench, size: dict[str, Any]) -> Tensor | Packed:
    """Random rows of gigabytes: no L2 holds them."""
    dtype, width = size["dtype"], size["numbers"]

    def make() -> Tensor | Packed:
        total = 1 << 13 if bench.mode == "dry" else min(4 << 30, bench.machine.memory // 16)
        if dtype == "float16":
            return bench.normal(total // (2 * width), width, dtype=torch.float16)
        row = ops.packed_bytes(width, dtype)
        kind = torch.int8 if dtype == "int8" else torch.uint8
        codes = torch.empty(total // row, row, dtype=kind, device=bench.device)
        codes.view(torch.uint8).random_(0, 256)
        if dtype == "int8":
            codes.clamp_(-127, 127)
        return Packed(codes, dtype, width, torch.rand(len(codes), device=bench.device) + 0.5)

    return bench.once("cache", (dtype, width), make)


def _length(cache: Tensor | Packed) -> int:
    return len(cache.codes if isinstance(cache, Packed) else cache)


def _bytes(cache: Tensor | Packed) -> int:
    if isinstance(cache, Tensor):
        return cache.nbytes
    return cache.codes.nbytes + (cache.scale.nbytes if cache.scale is not None else 0)


def _queries(bench: Bench, size: dict[str, Any]) -> Tensor:
    """As many as are ever asked; a case takes the first. All their scores are worked out once for a cache."""
    width = size["numbers"]
    most = max(QUERIES) if bench.mode == "full" else 16
    return bench.once("queries", width, lambda: bench.normal(most, width))


def _scores(bench: Bench, size: dict[str, Any]) -> Tensor:
    """[most queries, N] float32: all products in float64, some rows at a time."""

    def make() -> Tensor:
        cache, queries = _cache(bench, size), _queries(bench, size).double()
        parts = []
        step = max(1, (1 << 27) // size["numbers"])
        for first in range(0, _length(cache), step):
            if isinstance(cache, Packed):
                assert cache.scale is not None
                few = Packed(
                    cache.codes[first : first + step],
                    cache.dtype,
                    cache.width,
                    cache.scale[first : first + step],
                )
                rows = decoded(few)
            else:
                rows = cache[first : first + step].double()
            parts.append((queries @ rows.T).float())
        return torch.cat(parts, dim=1)

    return bench.once("scores", (size["dtype"], size["numbers"]), make)[: size["queries"]]


def scan_error(exact: Tensor, found: tuple[Tensor, ...]) -> float:
    """How far off the scores are, and how much worse the rows found are than the best ones, whichever is
    more, as a share of the scores' root mean square. NaN where a row is missing or named twice."""
    unit = float(exact.square().mean().sqrt())
    worst = 0.0
    for scores, rows, largest in ((found[0], found[1], True), (found[2], found[3], False)):
        k = rows.shape[1]
        distinct = rows.sort(dim=1).values.diff(dim=1) > 0
        if bool((rows < 0).any()) or bool((rows >= exact.shape[1]).any()) or not bool(distinct.all()):
            return float("nan")
        at = exact.gather(1, rows)
        best = exact.topk(k, dim=1, largest=largest).values
        kept = at.sort(dim=1, descending=largest).values
        for difference in (scores.float() - at, best - kept):
            off = float(difference.abs().max()) / unit
            if not off <= worst:  # NaN is kept
                worst = off
    return worst


def scan(size: dict[str, Any], way: str) -> Case:
    def run(bench: Bench) -> Facts:
        if way in BACKENDS:
            bench.kernel("topk_scan_both_ends", way)
        elif way == "faiss":
            peers.needed("faiss")
        cache, queries, k = _cache(bench, size), _queries(bench, size)[: size["queries"]], size["k"]
        call: Callable[[], Any]
        if way in BACKENDS:

            def call() -> Any:
                return ops.topk_scan_both_ends(cache, queries, k, backend=way)

        elif way == "torch":
            call = peers.torch_scan(cache, queries, k)
        else:
            assert isinstance(cache, Tensor)
            index = bench.once("faiss", size["numbers"], lambda: peers.faiss_index(cache))
            call = peers.faiss_scan(index, queries, k)
        exact = _scores(bench, size)
        operations = 2.0 * size["queries"] * _length(cache) * size["numbers"]
        # Products of a packed row's codes are counted at the bfloat16 rate, though integer units exist.
        cost = Cost(_bytes(cache) + queries.nbytes, operations=operations, rate="bf16_per_s")
        facts = bench.measured(
            [call],
            cost,
            lambda found: scan_error(exact, found),
            TOLERANCES[size["dtype"]],
            least=5 if way in BACKENDS else 2,
        )
        return facts | {"rows": _length(cache)}

    goals = {"read": GOAL} if way in BACKENDS and size["queries"] <= GOAL_QUERIES else {}
    return Case("topk_scan", way, size, run, goals)


def scan_cases(mode: Mode) -> list[Case]:
    listed: list[Case] = []
    for size in scan_sizes(mode):
        listed += [scan(size, way) for way in BACKENDS]
        if mode == "dry" or (size["k"] == 10 and size["queries"] in PEER_QUERIES):
            listed.append(scan(size, "torch"))
            if size["dtype"] == "float16" and size["numbers"] < 65536:
                listed.append(scan(size, "faiss"))
    return listed


# ---------------------------------------------------------------------------------------------- streaming


def to_device(bench: Bench) -> Facts:
    """Pinned memory to the device: the ceiling of a scan of what does not fit there."""
    size = 1 << 16 if bench.mode == "dry" else 1 << 30
    host = bench.machine.pinned(size)
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    times = bench.machine.time([lambda: there.copy_(host, non_blocking=True)], seconds=0.4)
    return {"seconds": times.median, "bytes": size, "rate": size / times.median}


def from_disk(bench: Bench) -> Facts:
    """A whole cache folder scanned by `rapidin.scan.scan_cache`, with its copies to the device."""
    from rapidin import methods
    from rapidin.cache import Cache
    from rapidin.scan import Source, scan_cache

    blocks, width, rows = (2, 64, 40) if bench.mode == "dry" else (112, 512, 8192)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "cache", blocks, width, rows)
        cache = Cache(Path(folder) / "cache", resident=False)
        source = Source(cache, methods.prepare(torch.randn(1, blocks, width)))
        settings: dict[str, Any] = {} if bench.machine.dry else {"device": bench.device}
        times = bench.machine.time([lambda: scan_cache(source, 10, **settings)], seconds=1.0, most=5)
        stored = cache.manifest.row_bytes * rows
    return {"seconds": times.called, "bytes": stored, "rate": stored / times.called, "rows": rows}


def stream_cases(mode: Mode) -> list[Case]:
    return [
        Case("stream", "pinned memory to the device", {}, to_device),
        Case("stream", "scan_cache, float16 rows of 57,344 numbers", {}, from_disk),
    ]
