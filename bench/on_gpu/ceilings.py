"""What the device can do at most, measured in the same run: the floors of all other rows come from these."""

from __future__ import annotations

import torch
from torch import Tensor

from on_gpu.cases import Bench, Case, MissingError, Mode
from on_gpu.device import Times
from on_gpu.plan import Facts

UNITS = {"read_bytes_per_s": "bytes/s", "copy_bytes_per_s": "bytes/s"}
UNITS |= {"bf16_per_s": "operations/s", "float32_per_s": "operations/s"}


def _size(bench: Bench) -> int:
    return 1 << 16 if bench.small else min(4 << 30, bench.machine.memory // 16)


def _buffer(bench: Bench) -> Tensor:
    return bench.once("buffer", "read", lambda: bench.normal(_size(bench) // 4))


def _rate(ceiling: str, amount: float, times: Times) -> Facts:
    return times.facts() | {
        "ceiling": ceiling,
        "rate": amount / times.median,
        "rate_unit": UNITS[ceiling],
    }


def copy(bench: Bench) -> Facts:
    x = _buffer(bench)
    y = torch.empty_like(x)
    times = bench.machine.time([lambda: y.copy_(x)], seconds=0.3)
    return _rate("copy_bytes_per_s", 2 * x.nbytes, times)


def read_by_torch(bench: Bench) -> Facts:
    x = _buffer(bench)
    return _rate("read_bytes_per_s", x.nbytes, bench.machine.time([x.sum], seconds=0.3))


def read_by_triton(bench: Bench) -> Facts:
    try:
        from on_gpu.read_kernel import read_sums
    except ImportError as why:
        raise MissingError(f"triton: {why}") from None
    x = _buffer(bench)
    out = torch.full((bench.machine.units * 8,), torch.nan, device=bench.device)
    read_sums(x, out)
    error = abs(float(out.double().sum() - x.double().sum())) / float(x.double().norm())
    if not error < 1e-2:
        raise ValueError(f"the reading kernel's sum is off by {error:.1e} of the numbers' length")
    times = bench.machine.time([lambda: read_sums(x, out)], seconds=0.3)
    return _rate("read_bytes_per_s", x.nbytes, times)


def product(dtype: torch.dtype, name: str, side: int) -> Case:
    def run(bench: Bench) -> Facts:
        n = 64 if bench.small else side
        a, b = bench.normal(n, n, dtype=dtype), bench.normal(n, n, dtype=dtype)
        out = torch.empty_like(a)
        times = bench.machine.time([lambda: torch.mm(a, b, out=out)], seconds=0.3)
        return _rate(name, 2 * n**3, times)

    return Case("ceiling", f"torch: {str(dtype).removeprefix('torch.')} product", {"side": side}, run)


def cases(mode: Mode) -> list[Case]:
    return [
        Case("ceiling", "torch: copy, bytes read and written", {}, copy),
        Case("ceiling", "torch: sum, bytes read", {}, read_by_torch),
        Case("ceiling", "triton: sum, bytes read", {}, read_by_triton),
        product(torch.bfloat16, "bf16_per_s", 8192),
        product(torch.float32, "float32_per_s", 4096),
    ]
