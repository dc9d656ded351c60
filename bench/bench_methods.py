"""What a method costs before the scan: preconditioning queries by DataInf and Fisher, against its products.

pytest bench/bench_methods.py --benchmark-json=methods.json

DataInf multiplies each row's blocks with each query and back. Fisher forms the second moments, or, where rows
are fewer than bins, their Gram matrices. The limit is the same products alone, in float32, on rows in
memory; ours also decodes the rows and solves.
"""

import pytest
import torch
from limits import best_seconds, note
from random_cache import write_cache
from turns import LIMIT_SECONDS, measure, sized

from rapidin.attribution import methods
from rapidin.cache import Cache

BLOCKS, WIDTH, QUERIES = sized((24, 512, 8), (3, 64, 2))
ROWS = sized((256, 2048), (32, 96))


@pytest.fixture(scope="module", params=ROWS)
def cache(request, tmp_path_factory) -> Cache:
    folder = tmp_path_factory.mktemp(f"rows-{request.param}")
    write_cache(folder, BLOCKS, WIDTH, request.param)
    return Cache(folder)


@pytest.mark.parametrize("method", ["datainf", "fisher"])
def bench_methods(benchmark, cache, method):
    sketch = torch.randn(QUERIES, BLOCKS, WIDTH)
    rows = cache.sketches().view(-1, BLOCKS, WIDTH).transpose(0, 1).contiguous()  # [blocks, n, width]
    vectors = sketch.permute(1, 2, 0).contiguous()
    n = len(cache)

    def products() -> None:
        if method == "datainf":
            torch.bmm(rows.mT, torch.bmm(rows, vectors))
        elif n < WIDTH:
            torch.bmm(rows, rows.mT)
        else:
            torch.bmm(rows.mT, rows)

    limit = best_seconds(products, LIMIT_SECONDS)
    measure(benchmark, methods.prepare, sketch, cache, method=method)
    best = benchmark.stats.stats.min
    note(benchmark, rows=n, blocks=BLOCKS, width=WIDTH, queries=QUERIES, of_products=limit / best)
