"""What the standard errors of hits cost: reading the chosen rows again, against adding them up once.

pytest bench/bench_score_errors.py --benchmark-json=score_errors.json

A query of `--top-k 10` looks at 42 rows at each end. The limit is one pass over as many numbers in memory:
the product with the query and its sum. rapidin decodes the rows and makes some ten such passes.
"""

import pytest
import torch
from limits import best_seconds, note
from random_cache import write_cache
from turns import LIMIT_SECONDS, measure, sized

from rapidin.attribution import methods
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.score_errors import details
from rapidin.cache import Cache

BLOCKS = sized((28, 210), (3,))
WIDTH, ROWS, CHOSEN = sized((512, 256, 84), (64, 96, 84))


@pytest.fixture(scope="module", params=BLOCKS)
def cache(request, tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp(f"blocks-{request.param}")
    write_cache(folder, request.param, WIDTH, ROWS)
    return Cache(folder)


def bench_score_errors(benchmark, cache):
    blocks = len(cache.layers)
    scan = CacheScan(cache, methods.prepare(torch.randn(1, blocks, WIDTH), cache))
    rows = torch.randperm(ROWS)[None, :CHOSEN]
    held = torch.randn(CHOSEN, blocks, WIDTH)

    def once() -> None:
        (held * scan.query.vectors).sum(2)

    limit = best_seconds(once, LIMIT_SECONDS)
    measure(benchmark, details, scan, rows)
    best = benchmark.stats.stats.min
    note(benchmark, rows=CHOSEN, blocks=blocks, width=WIDTH, of_one_pass=limit / best)
