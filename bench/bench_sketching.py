"""Sketches beside what else makes a gradient small, each group in turns on the same numbers.

pytest bench/bench_sketching.py --benchmark-json=sketching.json

A whole gradient to 65,536 numbers: `flat_sketch`, the shuffles of the RapidIn paper written as it describes
them, and a count sketch by index_add; a dense projection only on 4,096 elements, for whose matrix 1 GiB is
enough (for 2^27 elements it would be 32 TiB). A layer's gradient from its factors: `linear_sketch`, the
double-sided projection of LoGra and Bergson to as many numbers, and the gradient formed, then sketched.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from limits import note
from torch import Tensor
from torch.nn import functional as F
from turns import in_turns, sized

from rapidin import ops

DIM = 65536
ELEMENTS = sized(1 << 27, 1 << 18)
DENSE_ELEMENTS = sized(4096, 16)

LAYERS = ((576, 576), (576, 1536), (4096, 4096))
BATCH, TOKENS = sized(4, 1), 128


class Shuffles:
    """RapidIn's way (Lin et al., ACL 2024, section 3.2): the gradient, padded, is a matrix whose rows and
    columns are permuted in turn, `shuffles` times each; then random signs, and sums of neighbours."""

    def __init__(self, elements: int, dim: int, shuffles: int = 20, device: str = "cpu") -> None:
        self.dim = dim
        self.padded = -(-elements // dim) * dim
        # As square as may be: columns are gathered fastest where a row fits the cache.
        self.rows = max(2**i for i in range(math.isqrt(self.padded).bit_length()) if self.padded % 2**i == 0)
        columns = self.padded // self.rows
        sizes = [(self.rows, columns)[n % 2] for n in range(2 * shuffles)]
        self.permutations = [torch.randperm(size, device=device) for size in sizes]
        self.signs = torch.randint(0, 2, (self.padded,), dtype=torch.int8, device=device) * 2 - 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        x = torch.cat([t.flatten() for t in tensors])
        x = F.pad(x, (0, self.padded - len(x)))
        for n, permutation in enumerate(self.permutations):
            x = x.view(self.rows, -1).index_select(n % 2, permutation)
        return (x.flatten() * self.signs).view(self.dim, -1).sum(1, dtype=torch.float32)


class CountSketch:
    """Each element with a random sign into a random bin, by torch."""

    def __init__(self, elements: int, dim: int, device: str = "cpu") -> None:
        self.dim = dim
        self.bins = torch.randint(0, dim, (elements,), dtype=torch.int32, device=device)
        self.signs = torch.randint(0, 2, (elements,), dtype=torch.int8, device=device) * 2 - 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        x = torch.cat([t.flatten() for t in tensors])
        return torch.zeros(self.dim, device=x.device).index_add_(0, self.bins, x.float() * self.signs)


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
