"""Preconditions a bfloat16 side of a layer: x + c U^T, rounded to bfloat16 once.

Strong directions are scaled down to the level of the others, so the two terms nearly cancel where x is large.
Therefore U and c are each the sum of two bfloat16 parts, three of the four products are added to x in
float32, and only the sum is rounded. No direction of the sum is far larger than the rest, so this rounding is
harmless.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
MOST_RANK = 256
_PROGRAMS = 512  # about as many share the work


@triton.jit
def _factor(x):
    """An operand of bfloat16 products; the interpreter multiplies its bits as if they were integers."""
    return x.to(tl.bfloat16).to(tl.float32) if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _add_low_rank_kernel(
    x_ptr,
    stride_batch,
    stride_token,
    stride_element,
    tokens,
    rows,
    n,
    share,
    along_ptr,
    gain_ptr,
    parts_ptr,
    out_ptr,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    shares = tl.cdiv(n, share)
    row = (tl.program_id(0) // shares).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % shares * share
    live = row < rows
    direction = tl.arange(0, RANK)
    known = direction < rank
    at = row[:, None] * (2 * rank) + direction[None, :]
    mask = live[:, None] & known[None, :]
    c = tl.load(along_ptr + at, mask=mask, other=0.0)
    c += tl.load(along_ptr + at + rank, mask=mask, other=0.0)
    c *= tl.load(gain_ptr + direction, mask=known, other=0.0)[None, :]
    high = _factor(c)
    low = _factor(c - high.to(tl.float32))
    x_rows = x_ptr + row // tokens * stride_batch + row % tokens * stride_token
    for begin in range(first, tl.minimum(first + share, n), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        there = column < n
        part = parts_ptr + column.to(tl.int64)[None, :] * (2 * rank) + direction[:, None]
        both = known[:, None] & there[None, :]
        u_high = tl.load(part, mask=both, other=0.0)  # [RANK, COLUMNS]
        u_low = tl.load(part + rank, mask=both, other=0.0)
        inside = live[:, None] & there[None, :]
        x = x_rows[:, None] + column.to(tl.int64)[None, :] * stride_element
        sums = tl.dot(low, _factor(u_high))
        sums = tl.dot(high, _factor(u_low), acc=sums)
        sums = tl.dot(high, _factor(u_high), acc=sums)
        sums += tl.load(x, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + row[:, None] * n + column[None, :]
        tl.store(out, sums.to(tl.bfloat16), mask=inside)


def add_low_rank(x: Tensor, projected: Tensor, gain: Tensor, parts: Tensor) -> Tensor:
    """``x + ((projected's two halves added) * gain) @ basis.T``.

    x: [B, T, n] bfloat16, any strides; projected: [B T, 2 r] float32, x times either part of the basis; gain:
    [r] float32; parts: [n, 2 r] bfloat16, the basis' high and low parts; the last three contiguous. r is at
    most MOST_RANK.
    -> [B, T, n] bfloat16, contiguous
    """
    batch, tokens, n = x.shape
    rank = len(gain)
    out = torch.empty(batch, tokens, n, device=x.device, dtype=torch.bfloat16)
    width = max(16, triton.next_power_of_2(rank))
    size = 128 if width <= 64 else 64 if width == 128 else 32  # of a tile: 99 KB hold it
    tiles, columns = triton.cdiv(batch * tokens, size), triton.cdiv(n, size)
    share = triton.cdiv(columns, min(columns, max(1, _PROGRAMS // tiles))) * size
    _add_low_rank_kernel[(tiles * triton.cdiv(n, share),)](
        x, *x.stride(), tokens, batch * tokens, n, share, projected, gain, parts, out, rank,
        RANK=width, ROWS=size, COLUMNS=size, num_warps=8 if size == 128 else 4, num_stages=2,
    )  # fmt: skip
    return out
