"""What comparing checksums adds to the first scan of a cache, whose files are in the system's memory.

pytest bench/bench_first_scan.py --benchmark-json=first_scan.json

The limit is the same scan without the comparison, and reading the files once. Each round opens the cache anew
and touches its files, so that every shard is compared again, as in a new process. `times_sha256` is how much
quicker the checksum is than the SHA-256 that `rapidin verify` compares, on one shard. `of_cpu_without`
compares seconds of all threads, which other work on the machine hardly changes.
"""

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch
import xxhash
from limits import best_seconds, note, read_files
from random_cache import write_cache
from turns import LIMIT_SECONDS, in_turns, sized

from rapidin.attribution import methods
from rapidin.attribution.scan import scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.codec import CodecConfig

BLOCKS, WIDTH, BYTES = sized((28, 512, 1 << 29), (3, 64, 1 << 20))
FORMATS = {"float16": CodecConfig("float16"), "sign": CodecConfig("sign", 2048 if BLOCKS > 3 else 256)}


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, tmp_path_factory) -> Path:
    path, code = tmp_path_factory.mktemp(request.param), FORMATS[request.param]
    each = 2 * BLOCKS * WIDTH if code.bytes is None else code.bytes
    write_cache(path, BLOCKS, WIDTH, BYTES // each, code, shards=None)
    return path


def bench_first_scan(benchmark, folder):
    shards = sorted(folder.glob("shard-*"))
    sketch = torch.randn(1, BLOCKS, WIDTH)

    cpu: dict[bool, list[float]] = {True: [], False: []}

    def scan(*, compared: bool) -> None:
        for path in shards:
            os.utime(path)
        cache = Cache(folder, compared=compared)
        start = time.process_time()
        scan_cache(CacheScan(cache, methods.prepare(sketch, cache)), 10)
        cpu[compared].append(time.process_time() - start)

    best = in_turns(
        benchmark,
        lambda: scan(compared=True),
        {"without": lambda: scan(compared=False), "read": lambda: read_files(shards, 1 << 20)},
    )
    ours, total = benchmark.stats.stats.min, sum(path.stat().st_size for path in shards)
    data = shards[0].read_bytes()
    fast = best_seconds(lambda: xxhash.xxh3_64_digest(data), LIMIT_SECONDS)
    slow = best_seconds(lambda: hashlib.sha256(data).digest(), LIMIT_SECONDS)
    note(
        benchmark,
        gb=total / 1e9,
        gb_per_s=total / ours / 1e9,
        checksum_gb_per_s=len(data) / fast / 1e9,
        of_without=best["without"] / ours,
        of_cpu_without=min(cpu[False]) / min(cpu[True]),
        cpu_s_per_gb=(min(cpu[True]) - min(cpu[False])) / total * 1e9,
        of_reading=best["read"] / ours,
        times_sha256=slow / fast,
    )
