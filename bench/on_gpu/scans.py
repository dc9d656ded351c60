"""topk_scan of caches in the GPU's memory, and what comes over the bus for those that are larger."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_cache import write_cache
from torch import Tensor

from on_gpu import peers
from on_gpu.cases import SMALL, Bench, Case, Cost, Mode, backends_of
from on_gpu.plan import BACKENDS, Facts
from rapidin import ops
from rapidin.attribution import methods
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.ops import Packed
from rapidin.ops.reference.packed import decoded

# dtype, numbers of a row: rows of 2,000 bytes in each dtype, and RapidIn's own 65,536 numbers
ROWS = (("sign", 16000), ("float16", 65536), ("int8", 2000), ("float16", 1000), ("int4", 4000))
# A code of 2,048 bytes an example has rows of so many numbers, 1,785 bytes, which only a stride of 1,792
# keeps on addresses that are multiples of 16.
LEARNT, LEARNT_STRIDES = 14280, (1785, 1792)
BLOCKS = 120  # of those rows, where each has a scale of its own, as `--normalize none` and `cosine` scan them
NUMBERS = {"float16": 0.5, "int8": 1, "int4": 2, "sign": 8}  # a byte
QUERIES = (1, 16, 4, 64, 256)
PEER_QUERIES = (1, 64)  # the others' time hardly depends on them, and is most of what the stage takes
GOAL, GOAL_QUERIES = 0.85, 16
# Of the scores' root mean square: queries are rounded to steps for packed rows (rapidin.ops.topk_scan).
TOLERANCES = {"float16": 5e-3, "int8": 1e-2, "int4": 0.1, "sign": 0.1}


def scan_sizes(mode: Mode) -> list[dict[str, Any]]:
    def size(
        dtype: str, numbers: int, queries: int, k: int, stride: int | None = None, blocks: int = 1
    ) -> dict[str, Any]:
        """stride: bytes from row to row; blocks: that are scaled apart in each row, 1 for none."""
        stride = stride or _row_bytes(dtype, numbers)
        return {
            "dtype": dtype,
            "numbers": numbers,
            "stride": stride,
            "blocks": blocks,
            "queries": queries,
            "k": k,
        }

    if mode in SMALL:
        odd = mode == "smoke"
        listed = [size("sign", 144, 1, 5), size("float16", 70, 2, 5), size("int8", 80, 2, 5)]
        listed += [size("int4", 72, 1, 5), size("sign", 600, 2, 5, 80, 3)]
        if odd:
            listed += [
                size(d, n, 17, 7) for d, n in (("sign", 1001), ("int4", 331), ("int8", 333), ("float16", 67))
            ]
            listed += [size(d, 640, 3, 7, blocks=5) for d in ("sign", "int4", "int8", "float16")]
            listed += [size("sign", 1001, 5, 300)]
        return listed
    pairs = [(q, 10) for q in QUERIES] + [(1, 100), (64, 100)]
    learnt = [size("sign", LEARNT, q, 10, stride) for q in (1, 16) for stride in LEARNT_STRIDES]
    learnt += [size("sign", LEARNT, q, 10, LEARNT_STRIDES[1], BLOCKS) for q in (1, 16)]
    if mode == "quick":
        return [*(size(d, n, q, k) for d, n in ROWS for q, k in pairs[:2]), *learnt[:4]]
    first, *others = ROWS
    return [
        *(size(*first, q, k) for q, k in pairs),
        *learnt,
        *(size(d, n, q, k) for d, n in others for q, k in pairs),
    ]


def _row_bytes(dtype: str, numbers: int) -> int:
    return 2 * numbers if dtype == "float16" else ops.packed_bytes(numbers, dtype)  # type: ignore[arg-type]


def _cache(bench: Bench, size: dict[str, Any]) -> Tensor | Packed:
    """Random rows of gigabytes: no L2 holds them."""
    dtype, width, stride = size["dtype"], size["numbers"], size["stride"]

    def make() -> Tensor | Packed:
        total = 1 << 13 if bench.small else min(4 << 30, bench.machine.memory // 16)
        if dtype == "float16":
            return bench.normal(total // (2 * width), width, dtype=torch.float16)
        kind = torch.int8 if dtype == "int8" else torch.uint8
        held = torch.empty(total // stride, stride, dtype=kind, device=bench.device)
        held.view(torch.uint8).random_(0, 256)
        if dtype == "int8":
            held.clamp_(-127, 127)
        codes = held[:, : _row_bytes(dtype, width)]
        if bench.small:  # the bits after an odd row's last number must be 0
            codes.copy_(ops.pack(bench.normal(len(held), width), dtype, backend="reference").codes)
        return Packed(codes, dtype, width, torch.rand(len(codes), device=bench.device) + 0.5)

    return bench.once("cache", (dtype, width, stride), make)


def _scales(bench: Bench, size: dict[str, Any], rows: int) -> dict[str, Any]:
    """The additional arguments of a scan that scales blocks: their edges and each row's scales."""
    if size["blocks"] == 1:
        return {}
    edges = torch.linspace(0, size["numbers"], size["blocks"] + 1).long().tolist()
    scales = bench.once(
        "scales", (rows, size["blocks"]), lambda: torch.rand(rows, size["blocks"], device=bench.device) + 0.5
    )
    return {"scales": scales, "offsets": edges}


def _length(cache: Tensor | Packed) -> int:
    return len(cache.codes if isinstance(cache, Packed) else cache)


def _bytes(cache: Tensor | Packed) -> int:
    if isinstance(cache, Tensor):
        return cache.nbytes
    return cache.codes.nbytes + (cache.scale.nbytes if cache.scale is not None else 0)


def _queries(bench: Bench, size: dict[str, Any]) -> Tensor:
    """As many as are ever asked; a case takes the first. All their scores are worked out once for a cache."""
    width = size["numbers"]
    most = max(QUERIES) if bench.mode == "full" else 17
    return bench.once("queries", width, lambda: bench.normal(most, width))


def _scores(bench: Bench, size: dict[str, Any]) -> Tensor:
    """[most queries, N] float32: all products in float64, some rows at a time."""

    def make() -> Tensor:
        cache, queries = _cache(bench, size), _queries(bench, size).double()
        scaled = _scales(bench, size, _length(cache))
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
            if scaled:
                edges = torch.tensor(scaled["offsets"], device=bench.device)
                each = scaled["scales"][first : first + step].double()
                rows = rows * each.repeat_interleave(edges.diff(), dim=1)
            parts.append((queries @ rows.T).float())
        return torch.cat(parts, dim=1)

    key = tuple(size[name] for name in ("dtype", "numbers", "stride", "blocks"))
    return bench.once("scores", key, make)[: size["queries"]]


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
        scaled = _scales(bench, size, _length(cache))
        call: Callable[[], Any]
        if way in BACKENDS:

            def call() -> Any:
                return ops.topk_scan_both_ends(cache, queries, k, backend=way, **scaled)

        elif way == "torch":
            call = peers.torch_scan(cache, queries, k)
        else:
            assert isinstance(cache, Tensor)
            index = bench.once("faiss", size["numbers"], lambda: peers.faiss_index(cache))
            call = peers.faiss_scan(index, queries, k)
        read = _bytes(cache) + queries.nbytes + (scaled["scales"].nbytes if scaled else 0)
        operations = 2.0 * size["queries"] * _length(cache) * size["numbers"]
        # Products of a packed row's codes are counted at the bfloat16 rate, though integer units exist.
        cost = Cost(read, products=operations)
        facts = bench.measured(
            [call],
            cost,
            lambda found: scan_error(_scores(bench, size), found),
            TOLERANCES[size["dtype"]],
            least=5 if way in BACKENDS else 2,
        )
        return facts | {"rows": _length(cache)}

    goals = {"read": GOAL} if way in BACKENDS and size["queries"] <= GOAL_QUERIES else {}
    return Case("topk_scan", way, size, run, goals)


def scan_cases(mode: Mode) -> list[Case]:
    listed: list[Case] = []
    for size in scan_sizes(mode):
        listed += [scan(size, way) for way in backends_of("topk_scan")]
        plain = size["blocks"] == 1 and size["numbers"] != LEARNT
        if plain and (mode == "dry" or (size["k"] == 10 and size["queries"] in PEER_QUERIES)):
            listed.append(scan(size, "torch"))
            if size["dtype"] == "float16" and size["numbers"] < 65536:
                listed.append(scan(size, "faiss"))
    return listed


# ---------------------------------------------------------------------------------------------- streaming


def to_device(bench: Bench) -> Facts:
    """Pinned memory to the device: the ceiling of a scan of what does not fit there."""
    size = 1 << 16 if bench.small else 1 << 30
    host = bench.machine.pinned(size)
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    times = bench.machine.time([lambda: there.copy_(host, non_blocking=True)], seconds=0.4)
    return times.facts() | {"bytes": size, "rate": size / times.median, "rate_unit": "bytes/s"}


def _scanned_cache(bench: Bench, folder: Path) -> tuple[Cache, CacheScan]:
    """A float16 cache of half a GB with shards like those of `rapidin cache`, and queries for it."""
    blocks, width, rows = (2, 64, 40) if bench.small else (112, 512, 8192)
    write_cache(folder / "cache", blocks, width, rows)
    cache = Cache(folder / "cache")
    return cache, CacheScan(cache, methods.prepare(torch.randn(1, blocks, width), cache))


def from_disk(bench: Bench) -> Facts:
    """A whole cache folder scanned by `rapidin.attribution.scan.scan_cache`, with its copies to the
    device."""
    with tempfile.TemporaryDirectory() as folder:
        cache, source = _scanned_cache(bench, Path(folder))
        stored = cache.manifest.row_bytes * cache.manifest.rows

        # These rows must not stay on the device between scans.
        stays = "resident" in inspect.signature(Cache).parameters
        again = CacheScan(Cache(cache.path, **({"resident": False} if stays else {})), source.query)

        def scan() -> None:
            scan_cache(again, 10, device=bench.device)

        times = bench.machine.time([scan], seconds=1.0, most=5)
    rate = stored / times.called
    facts = times.facts() | {"seconds": times.called, "bytes": stored, "rate": rate, "rate_unit": "bytes/s"}
    return facts | {"rows": cache.manifest.rows, "of": {}}


def second_scan(bench: Bench) -> Facts:
    """The second scan, of the rows that the first one left on the device: nothing is uploaded."""
    with tempfile.TemporaryDirectory() as folder:
        cache, source = _scanned_cache(bench, Path(folder))
        stored = cache.manifest.row_bytes * cache.manifest.rows
        start = time.perf_counter()
        first = scan_cache(source, 10, device=bench.device)
        taken = time.perf_counter() - start
        times = bench.machine.time(
            [lambda: scan_cache(source, 10, device=bench.device)], seconds=1.0, most=20
        )
        again = scan_cache(source, 10, device=bench.device)
    same = all(
        torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    if not same:
        raise ValueError("the second scan of a cache gives other scores or rows than the first")
    rate = stored / times.called
    facts = times.facts() | {"seconds": times.called, "bytes": stored, "rate": rate, "rate_unit": "bytes/s"}
    against = Cost(stored).against(bench.ceilings, times.called)
    return facts | {"first_seconds": taken, "rows": cache.manifest.rows} | against


def stream_cases(mode: Mode) -> list[Case]:
    kept = "float16 rows of 57,344 numbers"
    return [
        Case("stream", "pinned memory to the device", {}, to_device),
        Case("stream", f"scan_cache, {kept}", {}, from_disk),
        Case("stream", f"scan_cache once more, {kept}", {}, second_scan),
    ]
