"""The last step of sums that were cut into parts: added in one order, whatever the machine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count", "n"])
def _sum_parts_kernel(parts_ptr, sums_ptr, count, n, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([SLICES, BLOCK], tl.float32)
    begin = 0
    while begin < count:  # older interpreters take no bounds of range() that are known only now
        part = begin + tl.arange(0, SLICES)
        mask = (part < count)[:, None] & (i < n)[None, :]
        sums += tl.load(parts_ptr + part.to(tl.int64)[:, None] * n + i[None, :], mask=mask, other=0.0)
        begin += SLICES
    tl.store(sums_ptr + i, tl.sum(sums, axis=0), mask=i < n)


def sum_parts(parts: Tensor, sums: Tensor) -> None:
    """parts: [P, ...] float32, contiguous -> sums: [...], contiguous."""
    n = sums.numel()
    if n:
        slices = min(16, triton.next_power_of_2(len(parts)))
        _sum_parts_kernel[(triton.cdiv(n, 128),)](parts, sums, len(parts), n, SLICES=slices, BLOCK=128)


def added(parts: Tensor) -> Tensor:
    """The sum of parts [P, ...] float32, contiguous; itself where there is one."""
    if len(parts) == 1:
        return parts[0]
    sums = torch.empty_like(parts[0])
    sum_parts(parts, sums)
    return sums
