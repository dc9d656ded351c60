"""topk_scan, both ends, against reading the cache once, and beside torch in chunks.

pytest bench/bench_topk_scan.py --benchmark-json=topk_scan.json
"""

import pytest
import torch
from limits import note, read_seconds
from torch import Tensor

from rapidin import ops

ROWS, WIDTH, K = 4096, 32768, 10


def torch_in_chunks(cache: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What a user would write: the scores of some rows at a time, then topk of all."""
    scores = torch.cat([queries @ chunk.float().T for chunk in cache.split(256)], dim=1)
    return torch.topk(scores, k)


@pytest.fixture(scope="module")
def cache() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("queries", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("way", [ops.topk_scan_both_ends, torch_in_chunks], ids=["rapidin", "torch"])
def bench_topk_scan(benchmark, cache, way, queries):
    q = torch.randn(queries, WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(way(cache[:300], q, K)[1], ops.topk_scan(cache[:300], q, K, backend="reference")[1])
    limit = read_seconds(cache)
    benchmark(way, cache, q, K)
    best = benchmark.stats.stats.min
    note(
        benchmark,
        gb_per_s=cache.nbytes / best / 1e9,
        of_read_loop=limit / best,
        gflop_per_s=2 * queries * cache.numel() / best / 1e9,
    )
