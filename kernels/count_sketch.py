"""Count sketches of tokens, for the kernels that transform or multiply them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_sketch(
    x_ptr, table_ptr, token, tokens, n, stride_token, stride_element, first_bin,
    K: tl.constexpr, N: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """N of the K bins of T tokens' count sketches, [T, N] float32: p holds bin p // R + p % R * (N // R)."""
    position = tl.arange(0, N)
    bins = first_bin + position // R + position % R * (N // R)
    rows = token + tl.arange(0, T)
    live = (rows < tokens)[:, None]
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_token
    sums = tl.zeros([T, N], tl.float32)
    for chunk in range(0, n, K):
        entry = tl.load(table_ptr + chunk + bins)
        element = chunk + (entry & 0x7FFFFFFF)
        mask = live & (element < n)[None, :]
        x = tl.load(at + element.to(tl.int64)[None, :] * stride_element, mask=mask, other=0.0)
        sums += tl.where(entry < 0, -1.0, 1.0)[None, :] * x.to(tl.float32)
    return sums
