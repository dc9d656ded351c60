"""flat_sketch against reading each element once.

pytest bench/bench_flat_sketch.py --benchmark-json=flat_sketch.json
"""

import pytest
import torch
from limits import note, read_seconds
from turns import LIMIT_SECONDS, measure, sized

from rapidin import ops

ELEMENTS = sized(32 << 20, 1 << 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tensors", [1, 256])
@pytest.mark.parametrize("dim", [4096, 65536])
def bench_flat_sketch(benchmark, dim, tensors, dtype):
    x = torch.randn(ELEMENTS).to(dtype)
    parts = list(x.split(ELEMENTS // tensors))
    small = [p[:3000] for p in parts[:3]]
    wanted = ops.flat_sketch(small, dim, seed=1, backend="reference")
    torch.testing.assert_close(ops.flat_sketch(small, dim, seed=1), wanted, rtol=1e-4, atol=1e-4)
    limit = read_seconds(x, LIMIT_SECONDS)
    measure(benchmark, ops.flat_sketch, parts, dim, seed=1)
    best = benchmark.stats.stats.min
    note(benchmark, gb_per_s=x.nbytes / best / 1e9, of_read_loop=limit / best)
