"""Sketches beside what else makes a gradient small, each group in turns on the same numbers.

pytest bench/bench_sketching.py --benchmark-json=sketching.json

A whole gradient to 65,536 numbers: `flat_sketch`, the shuffles of the RapidIn paper written as it describes
them, and a count sketch by index_add; a dense projection only on 4,096 elements, for whose matrix 1 GiB is
enough (for 2^27 elements it would be 32 TiB). A layer's gradient from its factors: `linear_sketch`, the
double-sided projection of LoGra and Bergson to as many numbers, and the gradient formed, then sketched.
"""

import pytest
import torch
from gradient_sketches import CountSketch, Shuffles
from limits import note
from torch import Tensor
from turns import in_turns, sized

from rapidin import ops

DIM = 65536
ELEMENTS = sized(1 << 27, 1 << 18)
DENSE_ELEMENTS = sized(4096, 16)

LAYERS = ((576, 576), (576, 1536), (4096, 4096))
BATCH, TOKENS = sized(4, 1), 128


def bench_whole_gradient(benchmark):
    benchmark.group = f"whole gradient, {ELEMENTS:,} float32 to {DIM:,}"
    x = torch.randn(ELEMENTS)
    tensors = list(x.split(ELEMENTS // 256))
    shuffles, count_sketch = Shuffles(ELEMENTS, DIM), CountSketch(ELEMENTS, DIM)
    beside = in_turns(
        benchmark,
        lambda: ops.flat_sketch(tensors, DIM, seed=1),
        {
            "read loop": x.sum,
            "RapidIn's shuffles": lambda: shuffles(tensors),
            "count sketch by index_add": lambda: count_sketch(tensors),
        },
    )
    best = benchmark.stats.stats.min
    note(
        benchmark,
        gb_per_s=x.nbytes / best / 1e9,
        of_read_loop=beside["read loop"] / best,
        times_rapidin_shuffles=beside["RapidIn's shuffles"] / best,
        times_index_add=beside["count sketch by index_add"] / best,
    )


def bench_dense_projection(benchmark):
    benchmark.group = f"dense projection, {DENSE_ELEMENTS:,} float32 to {DIM:,}"
    x, matrix = torch.randn(DENSE_ELEMENTS), torch.randn(DIM, DENSE_ELEMENTS)
    beside = in_turns(
        benchmark, lambda: ops.flat_sketch([x], DIM, seed=1), {"dense projection": lambda: matrix @ x}
    )
    best = benchmark.stats.stats.min
    note(benchmark, times_dense_projection=beside["dense projection"] / best)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_layer(benchmark, layer, side):
    n_in, n_out = layer
    benchmark.group = f"layer {n_in} to {n_out}, {BATCH} x {TOKENS} tokens, to {side**2} numbers"
    inputs, grads = torch.randn(BATCH, TOKENS, n_in), torch.randn(BATCH, TOKENS, n_out)
    for_inputs, for_grads = torch.randn(n_in, side), torch.randn(n_out, side)

    def double_sided() -> Tensor:
        return torch.bmm((grads @ for_grads).transpose(1, 2), inputs @ for_inputs)

    def formed() -> Tensor:
        return ops.matrix_sketch(torch.bmm(grads.transpose(1, 2), inputs), side**2, seed=1)

    beside = in_turns(
        benchmark,
        lambda: ops.linear_sketch(inputs, grads, side**2, seed=1),
        {
            "read loop": lambda: (inputs.sum(), grads.sum()),
            f"double-sided projection, {side} x {side}": double_sided,
            "gradient formed, then sketched": formed,
        },
        rounds=100,
        seconds=5.0,
    )
    best = benchmark.stats.stats.min
    note(
        benchmark,
        us_per_token=best / (BATCH * TOKENS) * 1e6,
        of_read_loop=beside["read loop"] / best,
        times_double_sided=beside[f"double-sided projection, {side} x {side}"] / best,
        times_formed=beside["gradient formed, then sketched"] / best,
    )
