"""Compares a tiny model's `cache` and `query`, end to end on the GPU, with the same on the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from on_gpu.cases import Bench, Case, Mode
from on_gpu.models import KINDS, make_model, make_records
from on_gpu.plan import Facts
from rapidin import Attributor
from rapidin.attribution import methods
from rapidin.attribution.provenance import checked
from rapidin.attribution.scan import all_scores, scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache

# At least 160 features, so that K-FAC's preconditioner has 64 directions, as with a real model.
SIZE: dict[str, Any] = {
    "hidden": 160,
    "inner": 224,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 256,
}
SIZE |= {"examples": 24, "words": (6, 14), "spread": 0.1}
TOP = 3
# Options of `cache`, and the tolerance of scores as a share of their root mean square. A code may change
# where a product differs in its last digit, so rows of two devices differ.
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "float16": ({"dtype": "float16"}, 5e-3),
    "sign": ({"dtype": "sign"}, 0.05),
    "int8": ({"dtype": "int8"}, 1e-2),
    "int4": ({"dtype": "int4"}, 0.05),
    "400 bytes": ({"bytes": 400, "sample": 16}, 0.1),
}
QUERY_TOLERANCE = 5e-3  # of a query alone, on the same rows
BFLOAT16_TOLERANCE = 0.2  # gradients of a bfloat16 model: each step rounds, on each machine in its own order


def attributor_on(bench: Bench, where: str, size: dict[str, Any]) -> Attributor:
    """The tiny model's attributor on the "cpu" or the "gpu", made once."""
    device = bench.device if where == "gpu" else torch.device("cpu")
    key = size["kind"], size["model"], size["k"], size["kfac"]

    def make() -> Attributor:
        loaded = make_model(SIZE, size["kind"], device, getattr(torch, size["model"]))
        return Attributor(loaded, width=size["k"], preconditioner="kfac" if size["kfac"] else "off")

    return bench.once(f"attributor, {where}", key, make)


def _off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tables of scores as a share of their root mean square; NaN counts."""
    if got.shape != wanted.shape:
        return float("nan")
    return float((got.double() - wanted.double()).abs().max() / wanted.double().square().mean().sqrt())


Hits = list[list[tuple[int, float]]]  # (row, score) of each generation's best


def _scores(attributor: Attributor, cache: Cache, asked: list[dict[str, str]]) -> Tensor:
    """[generations, rows] float32 on the CPU."""
    if find_spec("rich") is None:
        return all_scores(_source(attributor, cache, asked))
    return attributor.scores(cache, asked)


def _hits(attributor: Attributor, cache: Cache, asked: list[dict[str, str]]) -> Hits:
    """The best of each generation, as `query` has them."""
    if find_spec("rich") is None:
        (scores, rows), _ = scan_cache(_source(attributor, cache, asked), TOP)
        return [list(zip(r.tolist(), s.tolist(), strict=True)) for r, s in zip(rows, scores, strict=True)]
    found = attributor.query(cache, asked, top_k=TOP, examples=None)
    return [[(hit.row, hit.score) for hit in result.top] for result in found]


def _source(attributor: Attributor, cache: Cache, asked: list[dict[str, str]]) -> CacheScan:
    """What `query` scans for, without what it prints with, for where rich is not installed."""
    source = checked(attributor.source, cache.manifest)
    sketch, _ = source.sketches([source.encoder(record) for record in asked])
    return CacheScan(cache, methods.prepare(sketch, cache))


def flow(
    size: dict[str, Any], make: Callable[[Bench, str, dict[str, Any]], Attributor] = attributor_on
) -> Case:
    """The comparison at one size; make: gives the attributor of each side, as `attributor_on` does."""
    format, tolerance = FORMATS[size["rows"]]
    if size["model"] != "float32":
        tolerance = BFLOAT16_TOLERANCE

    def run(bench: Bench) -> Facts:
        cpu, gpu = (make(bench, where, size) for where in ("cpu", "gpu"))
        records = make_records(SIZE)
        asked = make_records(SIZE | {"examples": 2}, seed=5)
        with tempfile.TemporaryDirectory() as folder:
            there = cpu.cache(records, Path(folder) / "cpu", **format)
            start = time.perf_counter()
            here = gpu.cache(records, Path(folder) / "gpu", **format)
            bench.machine.wait()
            caching = time.perf_counter() - start
            wanted = _scores(cpu, there, asked)
            query_error = _off(_scores(gpu, there, asked), wanted)
            cache_error = _off(_scores(cpu, Cache(here.path), asked), wanted)
            seconds = []
            found = []
            for _ in range(2):  # the second on a cache that is open, and on the device where it stays there
                start = time.perf_counter()
                found.append(_hits(gpu, here, asked))
                bench.machine.wait()
                seconds.append(time.perf_counter() - start)
        unit = float(wanted.double().square().mean().sqrt())
        worst = 0.0  # how much worse the hits are than the best, by the CPU's scores
        for scores, result in zip(wanted.double(), found[0], strict=True):
            best = scores.topk(TOP).values
            mine = scores[[row for row, _ in result]].sort(descending=True).values
            worst = max(worst, float((best - mine).max()) / unit)
        wrong = []
        query_tolerance = QUERY_TOLERANCE if size["model"] == "float32" else BFLOAT16_TOLERANCE
        if not query_error <= query_tolerance:
            wrong.append(f"a query of the CPU's cache is off by {query_error:.1e}")
        if not cache_error <= tolerance:
            wrong.append(f"the CPU's query of the GPU's cache is off by {cache_error:.1e}")
        if not worst <= tolerance:
            wrong.append(f"the hits are worse than the CPU's by {worst:.1e}")
        if found[0] != found[1]:
            wrong.append("a second query gives other hits than the first")
        facts: Facts = {"query_error": query_error, "cache_error": cache_error, "hits_error": worst}
        facts |= {
            "tolerance": tolerance,
            "k": gpu.source.width,
            "cache_seconds": caching,
            "query_seconds": seconds,
        }
        if wrong:
            return facts | {"state": "failed", "why": "; ".join(wrong)}
        return facts | {"state": "passed"}

    return Case("cache and query", "gpu", size, run)


def cases(mode: Mode) -> list[Case]:
    def size(
        rows: str, kfac: bool = True, k: int | str = 512, kind: str = KINDS[0], model: str = "float32"
    ) -> dict[str, Any]:
        return {"kind": kind, "model": model, "rows": rows, "kfac": kfac, "k": k}

    if mode == "dry":
        return [flow(size("float16", k=64)), flow(size("sign", False, k=64)), flow(size("400 bytes", k=64))]
    # The defaults first.
    listed = [size("float16", k="auto"), size("float16"), size("float16", kfac=False)]
    listed += [size(rows, kfac) for kfac in (True, False) for rows in FORMATS if rows != "float16"]
    listed += [size("float16", kind=KINDS[1]), size("float16", model="bfloat16")]
    return [flow(each) for each in listed]
