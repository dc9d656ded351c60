"""A kernel that does nothing but read: the bandwidth that one which reads its input once can hope for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def _read_sums_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((BLOCK,), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < n:
        i = first + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + i, mask=i < n, other=0.0)
        first += step
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def read_sums(x: Tensor, out: Tensor) -> None:
    """out [programs] float32: sums that together are that of x, [n] float32."""
    _read_sums_kernel[(len(out),)](x, out, x.numel(), BLOCK=BLOCK, num_warps=8)
