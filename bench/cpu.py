"""Measures on a CPU how near rapidin comes to its limits, each in turns with its limit, for
docs/measured/performance.md.

python bench/cpu.py                          # all stages, all threads; on an otherwise idle machine
python bench/cpu.py --threads 1 --only scan  # one thread, one stage
python bench/cpu.py --quick --out FOLDER     # tiny sizes: shows that every line runs
python bench/performance.py                  # then writes the page

Stages: scan (`topk_scan` against a read loop, and faiss where it is installed), normalize (a shard's scan
with other normalizations against `layer`), flat (`flat_sketch`), caching (against a bare forward and backward
pass) and disk (one query of a cache on disk against reading its files).
Results go to bench/results/cpu-<processor>-<threads>.json as they come; a later run replaces the rows that
it measures again. With one thread a time is of the processor, so that waiting for it does not count; with
more, and in the stage `disk`, it is that of a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "bench"), str(ROOT / "studies" / "common")]

Facts = dict[str, Any]
Ways = Mapping[str, Callable[[], object]]
LIMIT, OURS = "limit", "rapidin"
SAME_PRODUCTS = "the bare loop with its products by oneDNN"  # as caching has them, where they are faster so
GOALS = {"float16": 0.85, "int8": 0.85, "int4": 0.85, "sign": 0.75}  # of the read loop, one query
QUERIES = (1, 8, 64)
WIDE_ROWS = (112, 512, 6000)  # blocks, width, number
SPARE_BYTES = 10 << 30  # of the disk, left free


class Taken(NamedTuple):
    """Seconds of a clock, and of the processor in all threads."""

    clock: float
    cpu: float


class Turns:
    """Times ways of doing one thing in turns. by_cpu: whether shares compare seconds of the processor;
    queries: of scans; disk_rows: of the cache on disk, at most."""

    def __init__(
        self, rounds: int, by_cpu: bool, queries: Sequence[int] = QUERIES, disk_rows: int = 1
    ) -> None:
        self.rounds, self.by_cpu, self.queries, self.disk_rows = rounds, by_cpu, queries, disk_rows

    def row(
        self, stage: str, name: str, limit: str, ways: Ways, goal: float | None = None, **facts: Any
    ) -> Facts:
        """The medians of all ways after a run to warm up, the share of the limit, and how many times as long
        each peer took as ours."""
        for run in ways.values():
            run()
        taken: dict[str, list[Taken]] = {way: [] for way in ways}
        for _ in range(self.rounds):
            for way, run in ways.items():
                taken[way].append(timed(run))
        return self.of(stage, name, limit, taken, goal, **facts)

    def of(
        self,
        stage: str,
        name: str,
        limit: str,
        taken: Mapping[str, list[Taken]],
        goal: float | None = None,
        **facts: Any,
    ) -> Facts:
        """The same of times that were already taken."""
        clock = {way: statistics.median(t.clock for t in times) for way, times in taken.items()}
        cpu = {way: statistics.median(t.cpu for t in times) for way, times in taken.items()}
        counted = cpu if self.by_cpu else clock
        peers = {way: counted[way] / counted[OURS] for way in taken if way not in (LIMIT, OURS)}
        row = {
            "stage": stage,
            "name": name,
            "limit": limit,
            "of": counted[LIMIT] / counted[OURS],
            "goal": goal,
            "peers": peers,
            "by": "processor" if self.by_cpu else "clock",
            "rounds": len(taken[OURS]),
            "seconds": clock,
            "cpu_seconds": cpu,
            **facts,
        }
        print(line(row), flush=True)
        return row


def timed(run: Callable[[], object]) -> Taken:
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return Taken(time.perf_counter() - clock, time.process_time() - cpu)


def line(row: Facts) -> str:
    goal = f" (goal {row['goal']:g})" if row["goal"] is not None else ""
    peers = "".join(f"; {way} {times:.2f} times as long" for way, times in row["peers"].items())
    ours = (row["cpu_seconds"] if row["by"] == "processor" else row["seconds"])[OURS]
    return (
        f"{row['stage']:8} {row['name']}: {ours * 1e3:.4g} ms, {row['of']:.3f} of {row['limit']}{goal}{peers}"
    )


# ---- stages ----


def scan(turns: Turns, quick: bool) -> Iterator[Facts]:
    cases = import_module("bench_topk_scan")
    for dtype in cases.NUMBERS:
        rows = cases.rows_of(dtype)
        stored = rows if isinstance(rows, torch.Tensor) else rows.codes
        words = stored.reshape(-1).view(torch.float32)
        width = int(cases.ROW_BYTES * cases.NUMBERS[dtype])
        searches = {OURS: cases.rapidin_search(rows), **cases.faiss_searches(rows)}
        for queries in turns.queries:
            q = torch.randn(queries, width, generator=torch.Generator().manual_seed(1)).numpy()
            ways: dict[str, Callable[[], object]] = {LIMIT: words.sum}
            ways |= {way: partial(search, q) for way, search in searches.items()}
            fewer = Turns(min(turns.rounds, max(3, 9 // queries)), turns.by_cpu)
            yield fewer.row(
                "scan",
                f"{dtype}, queries: {queries}",
                "the read loop",
                ways,
                GOALS[dtype] if queries == 1 else None,
                bytes=stored.nbytes,
                row_bytes=cases.ROW_BYTES,
            )
        cases.rows_of.cache_clear()
    blocks, width, count = WIDE_ROWS if not quick else (3, 64, 200)
    wide = torch.randn(count, blocks * width, generator=torch.Generator().manual_seed(0)).half()
    words, search = wide.view(-1).view(torch.float32), cases.rapidin_search(wide)
    for queries in (1, 2, 4):
        q = torch.randn(queries, blocks * width, generator=torch.Generator().manual_seed(1)).numpy()
        yield turns.row(
            "scan",
            f"float16, rows of {blocks * width:,} numbers, queries: {queries}",
            "the read loop",
            {LIMIT: words.sum, OURS: partial(search, q)},
            GOALS["float16"] if queries == 1 else None,
            bytes=wide.nbytes,
            row_bytes=2 * blocks * width,
        )


def normalize(turns: Turns, quick: bool) -> Iterator[Facts]:
    """The scan of a shard with `weighted`, which multiplies each row by one number, and with `none` and
    `cosine`, which multiply each block of a row by a number of its own, against that with `layer`, which
    multiplies nothing. What is computed of the rows' lengths counts, too."""
    from rapidin import ops
    from rapidin.attribution.methods import ScanQuery
    from rapidin.cache.codec import Codec, CodecConfig, FloatCodec, PackedCodec, fit_shape

    blocks, width, count = WIDE_ROWS if not quick else (3, 64, 200)
    packed_count = 100_000 if not quick else 200
    shape = fit_shape(CodecConfig("sign", 2048 if not quick else 256, 0), blocks, width, None)
    codecs: dict[str, tuple[Codec, int]] = {
        f"float16, rows of {blocks * width:,} numbers": (FloatCodec("float16", blocks, width), count),
        "sign, rows of 2,048 bytes": (PackedCodec(shape, width, 3), packed_count),
    }
    for name, (codec, rows) in codecs.items():
        tensors = {
            part: torch.randint(1, 127, (rows, *size)).to(dtype)
            if not dtype.is_floating_point
            else (torch.rand(rows, *size) + 0.5).to(dtype)
            for part, (dtype, size) in codec.tensor_specs().items()
        }
        sketch = torch.randn(1, blocks, width, generator=torch.Generator().manual_seed(1))

        def search(norm: str, codec: Codec = codec, tensors: Any = tensors, sketch: Any = sketch) -> None:
            query = ScanQuery(sketch, norm)
            scales = query.scales(codec, tensors, zero_gradient=False)
            plan = codec.prepare(query.vectors).plan(tensors, scales, False)
            ops.topk_scan_both_ends(
                plan.parts,
                plan.queries,
                10,
                base=plan.base,
                scales=plan.scales,
                offsets=plan.offsets,
            )

        for norm in ("weighted", "none", "cosine"):
            ways = {LIMIT: partial(search, "layer"), OURS: partial(search, norm)}
            yield turns.row("normalize", f"`{norm}`, {name}", "the scan with `layer`", ways, rows=rows)


def flat(turns: Turns, quick: bool) -> Iterator[Facts]:
    from rapidin import ops

    elements, dim = (1 << 18, 4096) if quick else (1 << 27, 1 << 16)
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    ways = {LIMIT: x.sum, OURS: lambda: ops.flat_sketch([x], dim, seed=1)}
    name = f"{elements:,} float32 to {dim:,}"
    yield turns.row("flat", name, "the read loop", ways, 0.85, bytes=x.nbytes)


def caching(turns: Turns, quick: bool) -> Iterator[Facts]:
    from rapidin.ops.onednn import onednn_is_faster

    cases = import_module("bench_caching")
    for kind, goal in (("linear layers", 0.95), ("LoRA", 0.97)):
        for dtype in ("sign", "float16"):
            loop = cases.CachingLoop(kind, dtype)
            numbers = range(len(loop.batches))
            loop.bare(numbers[-1])
            loop.fit()
            loop.sketch(numbers[-1])
            loop.pack()
            ways = {LIMIT: loop.bare, OURS: loop.sketch}
            if onednn_is_faster():
                ways[SAME_PRODUCTS] = loop.bare_with_our_products
                ways[SAME_PRODUCTS](numbers[-1])
            taken: dict[str, list[Taken]] = {way: [] for way in ways}
            packing = []
            for _ in range(min(turns.rounds, 3)):
                parts: dict[str, list[Taken]] = {way: [] for way in ways}
                for number in numbers:
                    for way, run in ways.items():
                        parts[way].append(timed(partial(run, number)))
                packing.append(timed(loop.pack))
                parts[OURS].append(packing[-1])
                for way in ways:
                    taken[way].append(total(parts[way]))
            share = statistics.median(
                p.cpu / t.cpu if turns.by_cpu else p.clock / t.clock
                for p, t in zip(packing, taken[OURS], strict=True)
            )
            name = f"{kind}, {dtype} rows"
            facts: Facts = {"packing": share, "width": loop.source.width}
            if kind == "linear layers":
                facts["products"] = loop.preconditioner_share()
            yield turns.of("caching", name, "the bare loop", taken, goal, **facts)


def total(times: list[Taken]) -> Taken:
    return Taken(sum(t.clock for t in times), sum(t.cpu for t in times))


def disk(turns: Turns, quick: bool) -> Iterator[Facts]:
    """A cache of signs, at most 2,048 bytes an example, of as many rows as asked for or the disk has room
    for. Its pages are dropped before each run, or all read, as far as the memory holds them."""
    from limits import read_files
    from random_cache import write_cache
    from turns import clear_peak, peak_mb

    from rapidin.attribution import methods
    from rapidin.attribution.scan import scan_cache
    from rapidin.attribution.scan_pieces import CacheScan
    from rapidin.cache import Cache
    from rapidin.cache.codec import CodecConfig

    blocks, width, each = (3, 64, 256) if quick else (28, 512, 2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        room = max(0, shutil.disk_usage(folder).free - SPARE_BYTES)
        rows = 2000 if quick else min(turns.disk_rows, room // each)
        write_cache(folder, blocks, width, rows, CodecConfig("sign", each), shards=None)
        shards = sorted(folder.glob("shard-*"))
        sketch = torch.randn(1, blocks, width, generator=torch.Generator().manual_seed(1))
        peaks = []

        def drop() -> None:
            for path in shards:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def query() -> None:
            cache = Cache(folder, compared=False)
            clear_peak()
            scan_cache(CacheScan(cache, methods.prepare(sketch, cache)), 10)
            peaks.append(peak_mb())

        def read() -> None:
            read_files(shards, 4 << 20)

        for cached in (False, True):
            taken: dict[str, list[Taken]] = {LIMIT: [], OURS: []}
            for _ in range(min(turns.rounds, 3)):
                for way, run in ((LIMIT, read), (OURS, query)):
                    run() if cached else drop()
                    taken[way].append(timed(run))
            size = sum(path.stat().st_size for path in shards)
            where = "read before" if cached else "from the disk"
            yield Turns(turns.rounds, by_cpu=False).of(
                "disk",
                f"{rows:,} rows, {where}",
                "reading the files",
                taken,
                0.8,
                bytes=size,
                peak_mb=max(peaks),
            )


STAGES = {"scan": scan, "normalize": normalize, "flat": flat, "caching": caching, "disk": disk}


# ---- results ----


def about(threads: int) -> Facts:
    """The machine, as the page names it."""
    from rapidin.ops import _cpu

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.+)", info)
    try:
        faiss: str | None = import_module("faiss").__version__
    except ImportError:
        faiss = None
    return {
        "name": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": _cpu.current_set(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss},
    }


def commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of rapidin and of the limits"
    )
    parser.add_argument("--only", choices=STAGES, action="append", help="this stage; may be given again")
    parser.add_argument(
        "--queries", type=int, choices=QUERIES, action="append", help="of the scans; may be given again"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="how often each way is timed (default 9; slow ones at most 3 times)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=10_000_000,
        help="most rows of the cache of stage disk, which is written under TMPDIR",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which say nothing of the speed")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the results")
    options = parser.parse_args()
    if min(options.threads, options.rounds, options.rows) < 1:
        parser.error("--threads, --rounds and --rows must be at least 1")
    if options.quick:
        os.environ["RAPIDIN_BENCH_QUICK"] = "1"  # before the benchmarks' sizes are made, on import
        options.rounds = min(options.rounds, 2)
    torch.set_num_threads(options.threads)
    found = about(options.threads)
    slug = "-".join(re.findall(r"[a-z0-9]+", str(found["name"]).lower()))
    path = options.out / f"cpu-{slug}-{options.threads}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python bench/cpu.py", *sys.argv[1:]]),
        "load": found.pop("load"),
        "versions": found.pop("versions"),  # of each run, whose rows are kept beside those of others
    }
    turns = Turns(options.rounds, options.threads == 1, options.queries or QUERIES, options.rows)
    for stage in options.only or STAGES:
        for row in STAGES[stage](turns, options.quick):
            before = [old for old in before if (old["stage"], old["name"]) != (stage, row["name"])]
            before.append(row | measured)
            made = {"about": found, "quick": options.quick, "rows": before}
            path.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
