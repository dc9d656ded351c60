"""Products of float32 matrices by oneDNN and by torch's own library, for `rapidin.ops.onednn`.

pytest bench/bench_matmul.py --benchmark-json=matmul.json

Shapes are those of SmolLM2-135M's layers for a batch of tokens, and smaller ones, from which `is_worth_it`
has where oneDNN begins to be faster.
"""

import pytest
import torch
from limits import note
from turns import in_turns, sized

SHAPES = sized(  # rows, features, outputs
    (
        (1024, 576, 576),
        (1024, 576, 1536),
        (1024, 1536, 576),
        (512, 576, 49152),
        (1024, 576, 64),
        (64, 576, 576),
        (8, 576, 576),
        (4, 576, 1024),
        (1, 2048, 2048),
        (256, 96, 96),
        (64, 64, 64),
    ),
    ((64, 64, 64),),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_matmul(benchmark, shape):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    rows, features, outputs = shape
    x, weight = torch.randn(rows, features), torch.randn(outputs, features)
    multiply = torch.ops.mkldnn._linear_pointwise
    wanted = x.double() @ weight.double().T
    found = multiply(x, weight, None, "none", [], "")
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    benchmark.group = "matmul"
    others = {"torch": lambda: torch.nn.functional.linear(x, weight)}
    best = in_turns(benchmark, lambda: multiply(x, weight, None, "none", [], ""), others, rounds=15)
    ours = benchmark.stats.stats.min
    operations = 2 * rows * features * outputs
    note(
        benchmark,
        multiply_adds=operations // 2,
        gflops=operations / ours / 1e9,
        torch_gflops=operations / best["torch"] / 1e9,
        times_torch=best["torch"] / ours,
    )
