"""linear_sketch by each way, against reading the factors once, and beside the layer's own forward product.

pytest bench/bench_linear_sketch.py --benchmark-json=linear_sketch.json

Run with one thread (OMP_NUM_THREADS=1) for the cost constants in rapidin/ops/cpu.py.
"""

import pytest
import torch
from limits import best_seconds, note, read_seconds
from turns import LIMIT_SECONDS, measure, sized

from rapidin import ops
from rapidin.ops import cpu

BATCH, TOKENS = sized((4, 128), (1, 16))
LAYERS = sized(
    ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048), (576, 8), (8, 192), (4096, 8)),
    ((576, 576), (576, 8)),
)

WAYS = {
    "chosen": lambda a, g, k, seed: ops.linear_sketch(a, g, k, seed=seed),
    "fft": cpu.by_fft,
    "torch's fft": cpu.by_torch_fft,
    "product of both sketched": lambda a, g, k, seed: cpu.by_product(a, g, k, seed, True, True),
    "product of neither sketched": lambda a, g, k, seed: cpu.by_product(a, g, k, seed, False, False),
}


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("k", sized([64, 256, 512, 1024, 4096, 8192], [256]))
@pytest.mark.parametrize("way", WAYS)
def bench_linear_sketch(benchmark, way, k, layer):
    n_in, n_out = layer
    inputs, grads = torch.randn(BATCH, TOKENS, n_in), torch.randn(BATCH, TOKENS, n_out)
    wanted = ops.linear_sketch(inputs[:1, :9], grads[:1, :9], k, seed=1, backend="reference")
    torch.testing.assert_close(WAYS[way](inputs[:1, :9], grads[:1, :9], k, 1), wanted, rtol=1e-3, atol=1e-2)
    weight = torch.randn(n_in, n_out)
    limit = read_seconds(inputs, LIMIT_SECONDS) + read_seconds(grads, LIMIT_SECONDS)
    forward = best_seconds(lambda: inputs @ weight, LIMIT_SECONDS)
    measure(benchmark, WAYS[way], inputs, grads, k, 1)
    best = benchmark.stats.stats.min
    note(
        benchmark,
        us_per_token=best / (BATCH * TOKENS) * 1e6,
        of_read_loop=limit / best,
        of_forward=best / forward,
    )
