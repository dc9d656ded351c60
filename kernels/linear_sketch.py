"""linear_sketch: TensorSketch of sum_t g_t a_t^T from the factors, summed on tensor cores.

docs/reference/kernels.md derives the method. A program takes a share of one example's tokens, 16 at a time.
Chunk by chunk it loads both sides' elements in the order of their bins (a chunk of a row is a few kilobytes,
in the L1 cache from its first element on), takes the K numbers of a token modulo x^L - w for each R-th root
of unity w, K = R L, which is an R-point DFT, and adds the outer products of both sides' polynomials, [R, L,
L] sums. At the end these are folded along their diagonals and transformed back. R = 1: whole count sketches'
product.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapidin.kernels.count_sketch import count_sketch
from rapidin.kernels.sum_parts import added

TOKENS = tl.constexpr(16)  # of a tile: what the tensor cores sum over at a time
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
DIMS = (32, 64, 128, 256, 512)  # more: fourier_sketch.py
BLOCKS = 256  # about as many programs share the tokens of a batch


@triton.jit
def _polynomials(
    sketch, matrix_ptr, plane, K: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr
):
    """[16, K] count sketches times a [R, P] matrix along their R numbers of a coefficient: [16, L, P]."""
    matrix = tl.load(matrix_ptr + tl.arange(0, R)[:, None] * R + plane[None, :])
    numbers = tl.reshape(sketch, [TOKENS * (K // R), R])
    return tl.reshape(tl.dot(numbers, matrix, input_precision=PRECISION), [TOKENS, K // R, P])


@triton.jit
def _rounded(x, EXACT: tl.constexpr):
    if EXACT:
        return x
    elif INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _linear_sketch_kernel(
    inputs_ptr,
    inputs_table_ptr,
    n_in,
    stride_inputs_batch,
    stride_inputs_token,
    stride_inputs_element,
    grads_ptr,
    grads_table_ptr,
    n_out,
    stride_grads_batch,
    stride_grads_token,
    stride_grads_element,
    tokens,
    share,
    matrices_ptr,
    partial_ptr,
    K: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    EXACT: tl.constexpr,
):
    L: tl.constexpr = K // R
    precision: tl.constexpr = "tf32x3" if EXACT else "tf32"
    splits = tl.cdiv(tokens, share)
    split = tl.program_id(0) % splits
    batch = (tl.program_id(0) // splits).to(tl.int64)
    examples = tl.num_programs(0) // splits
    plane = tl.program_id(1) * P + tl.arange(0, P)
    inputs_ptr += batch * stride_inputs_batch
    grads_ptr += batch * stride_grads_batch
    first = split * share
    end = tl.minimum(first + share, tokens)
    sums = tl.zeros([L, L], tl.float32) if R == 1 else tl.zeros([P, L, L], tl.float32)
    for token in range(first, end, TOKENS):
        a = count_sketch(
            inputs_ptr, inputs_table_ptr, token, end, n_in, stride_inputs_token, stride_inputs_element, 0,
            K, K, R, TOKENS,
        )  # fmt: skip
        if R > 1:
            # A plane is the real or imaginary part of a product: the sum of two products of parts.
            right0 = _polynomials(a, matrices_ptr + 2 * R * R, plane, K, R, P, precision)
            right1 = _polynomials(a, matrices_ptr + 3 * R * R, plane, K, R, P, precision)
            right0 = _rounded(tl.permute(right0, [2, 0, 1]), EXACT)  # [P, 16, L]
            right1 = _rounded(tl.permute(right1, [2, 0, 1]), EXACT)
        g = count_sketch(
            grads_ptr, grads_table_ptr, token, end, n_out, stride_grads_token, stride_grads_element, 0,
            K, K, R, TOKENS,
        )  # fmt: skip
        if R == 1:
            left = _rounded(tl.trans(g), EXACT)
            sums = tl.dot(left, _rounded(a, EXACT), acc=sums, input_precision=precision)
        else:
            left = _polynomials(g, matrices_ptr, plane, K, R, P, precision)
            left = _rounded(tl.permute(left, [2, 1, 0]), EXACT)  # [P, L, 16]
            sums = tl.dot(left, right0, acc=sums, input_precision=precision)
            left = _polynomials(g, matrices_ptr + R * R, plane, K, R, P, precision)
            left = _rounded(tl.permute(left, [2, 1, 0]), EXACT)
            sums = tl.dot(left, right1, acc=sums, input_precision=precision)
    # Row u of a plane moves u to the right, and what is pushed out comes back on the left, wrapped.
    row = tl.arange(0, L)
    part = (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    out_ptr = partial_ptr + (part * examples + batch) * K
    if R == 1:
        index = (row[None, :] - row[:, None]) & (L - 1)
        tl.store(out_ptr + row, tl.sum(tl.gather(sums, index, 1), 0))
    else:
        index = tl.broadcast_to(((row[None, :] - row[:, None]) & (L - 1))[None], [P, L, L])
        moved = tl.gather(sums, index, 2)
        straight = tl.sum(tl.where((row[None, :] >= row[:, None])[None], moved, 0.0), 1)
        wrapped = tl.sum(tl.where((row[None, :] < row[:, None])[None], moved, 0.0), 1)
        number = tl.arange(0, R)
        at = matrices_ptr + number[:, None] * R + plane[None, :]
        out = tl.dot(tl.load(at + 4 * R * R), straight, input_precision="tf32x3")
        out = tl.dot(tl.load(at + 5 * R * R), wrapped, acc=out, input_precision="tf32x3")
        tl.store(out_ptr + number[:, None] * L + row[None, :], out)


def roots(dim: int) -> int:
    """R, the roots of unity for sketches of `dim`: 1 below 256."""
    return 1 if dim < 256 else max(16, dim // 32)


def _sizes(dim: int, r: int) -> tuple[int, int]:
    """Planes of a program and its warps: what fits the registers. Triton before 3.9 takes no products over
    fewer than 16 planes.
    """
    return (r, 8) if dim <= 256 else (16, 16)


@cache
def matrices(r: int, device: torch.device) -> Tensor:
    """[6, R, R] float32: what makes polynomials' parts of R numbers, and the R numbers of the planes' sums.

    Planes: 0 and 1 are the real roots 1 and -1, then the real and imaginary part of root exp(-2 pi i j / R),
    j = 1 .. R/2 - 1. 0, 1: the grads' part of each plane's first and second product; 2, 3: the inputs'. 4, 5:
    from the planes' straight and wrapped diagonals to the numbers at n, n + L, ..; as [out, plane].
    """
    angle = 2 * math.pi * torch.arange(r, dtype=torch.float64)
    dft = torch.zeros(r, r, dtype=torch.float64)  # [number, plane]
    made = torch.zeros(6, r, r, dtype=torch.float64)
    if r == 1:  # nothing to transform
        return made.float().to(device)
    dft[:, 0] = 1.0
    dft[:, 1] = 1.0 - 2.0 * (torch.arange(r) % 2)
    for j in range(1, r // 2):
        dft[:, 2 * j], dft[:, 2 * j + 1] = (angle * j / r).cos(), -(angle * j / r).sin()
    made[0, :, :2], made[2] = dft[:, :2], dft
    made[4, :, :2] = dft[:, :2] / r
    made[5, :, :2] = dft[:, :2] / r * torch.tensor([1.0, -1.0])
    for j in range(1, r // 2):
        re, im = 2 * j, 2 * j + 1
        made[0, :, re] = made[0, :, im] = dft[:, re]
        made[1, :, re], made[1, :, im] = -dft[:, im], dft[:, im]
        made[3, :, re], made[3, :, im] = dft[:, im], dft[:, re]
        # 2 Re(c exp(2 pi i j m / R)) / R, c = straight + exp(-2 pi i j / R) wrapped
        for n, turn in ((4, 0), (5, 1)):
            back = angle * j / r - turn * 2 * math.pi * j / r
            made[n, :, re], made[n, :, im] = 2 / r * back.cos(), -2 / r * back.sin()
    return made.float().to(device)


def linear_sketch(
    inputs: Tensor, grads: Tensor, dim: int, inputs_table: Tensor, grads_table: Tensor, blocks: int = BLOCKS
) -> Tensor:
    """inputs: [B, T, I], grads: [B, T, O] -> [B, dim] float32; tables: rapidin.ops.tables.columns.

    dim: one of DIMS. Rounds to bfloat16 once, before the products, where both sides are bfloat16. blocks:
    about as many programs share the tokens; the sums' order depends on it and the sizes alone.
    """
    batch, tokens, n_in = inputs.shape
    tiles = triton.cdiv(tokens, 16)
    share = triton.cdiv(tiles, min(tiles, max(1, blocks // batch))) * 16
    splits = triton.cdiv(tokens, share)
    r = roots(dim)
    exact = not inputs.dtype == grads.dtype == torch.bfloat16
    planes, warps = _sizes(dim, r)
    parts = r // planes
    partial = torch.empty(splits * parts, batch, dim, device=inputs.device, dtype=torch.float32)
    # Examples share axis 0 with the splits: the other axes of a grid have at most 65,535 programs.
    _linear_sketch_kernel[(splits * batch, parts)](
        inputs, inputs_table, n_in, *inputs.stride(),
        grads, grads_table, grads.shape[2], *grads.stride(),
        tokens, share, matrices(r, inputs.device), partial,
        K=dim, R=r, P=planes, EXACT=exact,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return added(partial)
