"""linear_sketch of 1,024 to 8,192 numbers: one complex Fourier transform a token, all in float32.

With p and q the count sketches of a token's two factors and Z the transform of p + i q, the sketch is the
inverse transform of the cross term in the sum of Z^2 (docs/sketch.md). A program takes a share of one
example's tokens, a few at a time. It loads both sides' elements in the order of their bins, transforms
K = R1 R2 R3 numbers by products with the [R, R] matrices of shorter transforms (R3 may be 1), and adds Z^2 in
the order in which the numbers come out. What is left is done once an example, in torch.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapidin.kernels.sum_parts import added

# The lengths of the transforms that one is made of, tokens that are transformed at a time, and warps. By dim.
_SIZES = {
    1024: (32, 32, 1, 4, 8),
    2048: (64, 32, 1, 2, 8),
    4096: (16, 16, 16, 1, 8),
    8192: (32, 16, 16, 1, 16),
}
DIMS = tuple(_SIZES)


@triton.jit
def _count_sketch(
    x_ptr, table_ptr, token, tokens, n, stride_token, stride_element,
    K: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The count sketches of T tokens, [T, K] float32; position p holds bin p // R + p % R * (K // R)."""
    position = tl.arange(0, K)
    bins = position // R + position % R * (K // R)
    rows = token + tl.arange(0, T)
    live = (rows < tokens)[:, None]
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_token
    sums = tl.zeros([T, K], tl.float32)
    for chunk in range(0, n, K):
        entry = tl.load(table_ptr + chunk + bins)
        element = chunk + (entry & 0x7FFFFFFF)
        mask = live & (element < n)[None, :]
        x = tl.load(at + element.to(tl.int64)[None, :] * stride_element, mask=mask, other=0.0)
        sums += tl.where(entry < 0, -1.0, 1.0)[None, :] * x.to(tl.float32)
    return sums


@triton.jit
def _bits_of_size(x, N):
    """Of the largest magnitude of each row: [T] int32, its exponent, and whether it is not zero; of N numbers
    as large as that the length is reckoned with: the exponents are those of twofold squares."""
    peak = tl.max(tl.abs(x), axis=1)
    return 2 * (peak.to(tl.int32, bitcast=True) >> 23) + N, peak > 0.0


@triton.jit
def _transformed(re, im, matrix_ptr, R: tl.constexpr):
    """Rows of R complex numbers, [M, R] each, times the R x R matrix of their transform."""
    at = tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]
    cos, sin = tl.load(matrix_ptr + at), tl.load(matrix_ptr + R * R + at)
    real = tl.dot(re, cos, input_precision="tf32x3")
    real = tl.dot(im, sin, acc=real, input_precision="tf32x3")
    imaginary = tl.dot(im, cos, input_precision="tf32x3")
    imaginary = tl.dot(re, -sin, acc=imaginary, input_precision="tf32x3")
    return real, imaginary


@triton.jit
def _fourier_sketch_kernel(
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
    bits,
    roots_ptr,
    partial_ptr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    T: tl.constexpr,
):
    K: tl.constexpr = R1 * R2 * R3
    M: tl.constexpr = R2 * R3
    LAST: tl.constexpr = R2 if R3 == 1 else R3
    splits = tl.cdiv(tokens, share)
    split = tl.program_id(0) % splits
    batch = (tl.program_id(0) // splits).to(tl.int64)
    inputs_ptr += batch * stride_inputs_batch
    grads_ptr += batch * stride_grads_batch
    first = split * share
    end = tl.minimum(first + share, tokens)
    # Roots of unity, as `roots` lays them out.
    turns = roots_ptr + 2 * R1 * R1
    second = turns + 2 * K
    turn_at = tl.arange(0, M)[:, None] * R1 + tl.arange(0, R1)[None, :]
    sums_re = tl.zeros([T * K // LAST, LAST], tl.float32)
    sums_im = tl.zeros([T * K // LAST, LAST], tl.float32)
    for token in range(first, end, T):
        re = _count_sketch(
            inputs_ptr, inputs_table_ptr, token, end, n_in, stride_inputs_token, stride_inputs_element,
            K, R1, T,
        )  # fmt: skip
        im = _count_sketch(
            grads_ptr, grads_table_ptr, token, end, n_out, stride_grads_token, stride_grads_element, K, R1, T
        )
        # Of Z^2 = P^2 - Q^2 + 2i P Q only the cross term is wanted: both are brought to about the same
        # length, by powers of two whose product is 1; to nothing where one is nothing.
        size_re, some_re = _bits_of_size(re, 0)
        size_im, some_im = _bits_of_size(im, bits)
        shift = tl.minimum(tl.maximum((size_im - size_re) >> 2, -126), 126)
        some = some_re & some_im
        re *= tl.where(some, ((127 + shift) << 23).to(tl.float32, bitcast=True), 0.0)[:, None]
        im *= tl.where(some, ((127 - shift) << 23).to(tl.float32, bitcast=True), 0.0)[:, None]
        re, im = _transformed(tl.reshape(re, [T * M, R1]), tl.reshape(im, [T * M, R1]), roots_ptr, R1)
        cos, sin = tl.load(turns + turn_at)[None], tl.load(turns + K + turn_at)[None]
        x, y = tl.reshape(re, [T, M, R1]), tl.reshape(im, [T, M, R1])
        re, im = x * cos + y * sin, y * cos - x * sin
        if R3 == 1:
            re, im = tl.permute(re, [0, 2, 1]), tl.permute(im, [0, 2, 1])
            re, im = tl.reshape(re, [T * R1, R2]), tl.reshape(im, [T * R1, R2])
            re, im = _transformed(re, im, second, R2)
        else:
            re = tl.permute(tl.reshape(re, [T, R2, R3, R1]), [0, 2, 3, 1])
            im = tl.permute(tl.reshape(im, [T, R2, R3, R1]), [0, 2, 3, 1])
            re, im = tl.reshape(re, [T * R3 * R1, R2]), tl.reshape(im, [T * R3 * R1, R2])
            re, im = _transformed(re, im, second, R2)
            at = tl.arange(0, R3)[:, None] * R2 + tl.arange(0, R2)[None, :]
            turns2 = second + 2 * R2 * R2
            cos, sin = tl.load(turns2 + at)[None, :, None, :], tl.load(turns2 + M + at)[None, :, None, :]
            x, y = tl.reshape(re, [T, R3, R1, R2]), tl.reshape(im, [T, R3, R1, R2])
            re, im = x * cos + y * sin, y * cos - x * sin
            re, im = tl.permute(re, [0, 2, 3, 1]), tl.permute(im, [0, 2, 3, 1])
            re, im = tl.reshape(re, [T * R1 * R2, R3]), tl.reshape(im, [T * R1 * R2, R3])
            re, im = _transformed(re, im, turns2 + 2 * M, R3)
        sums_re += re * re - im * im
        sums_im += 2.0 * re * im
    out_ptr = partial_ptr + (split.to(tl.int64) * (tl.num_programs(0) // splits) + batch) * (2 * K)
    at = tl.arange(0, K)
    tl.store(out_ptr + at, tl.sum(tl.reshape(sums_re, [T, K]), 0))
    tl.store(out_ptr + K + at, tl.sum(tl.reshape(sums_im, [T, K]), 0))


@cache
def roots(r1: int, r2: int, r3: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32, as the kernel reads them, and where it leaves which number: [K] int64.

    First the matrix [R1, R1] of the first transform, then what its results [R2 R3, R1] are multiplied by, the
    matrix of the second, and where there is a third what comes between them, [R3, R2], and its matrix.
    """
    k = r1 * r2 * r3

    def pair(rows: int, columns: int, whole: int) -> list[Tensor]:
        rows_columns = torch.outer(torch.arange(rows), torch.arange(columns)) % whole
        angle = rows_columns.double() * (2 * math.pi / whole)
        return [angle.cos().flatten(), angle.sin().flatten()]

    pairs = pair(r1, r1, r1) + pair(r2 * r3, r1, k) + pair(r2, r2, r2)
    if r3 > 1:
        pairs += pair(r3, r2, r2 * r3) + pair(r3, r3, r3)
    one, two, three = torch.arange(r1), torch.arange(r2), torch.arange(r3)
    number = one[:, None, None] + r1 * two[:, None] + r1 * r2 * three  # by place
    place = torch.empty(k, dtype=torch.int64)
    place[number.flatten()] = torch.arange(k)
    return torch.cat(pairs).float().to(device), place.to(device)


def fourier_sketch(
    inputs: Tensor, grads: Tensor, dim: int, inputs_table: Tensor, grads_table: Tensor, blocks: int = 256
) -> Tensor:
    """inputs: [B, T, I], grads: [B, T, O] -> [B, dim] float32; tables: rapidin.ops.tables.columns.

    dim: one of DIMS. blocks: about as many programs share the tokens; the sums' order depends on the sizes
    alone.
    """
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    r1, r2, r3, tile, warps = _SIZES[dim]
    tiles = triton.cdiv(tokens, tile)
    share = triton.cdiv(tiles, min(tiles, max(1, blocks // batch))) * tile
    splits = triton.cdiv(tokens, share)
    constants, place = roots(r1, r2, r3, inputs.device)
    bits = min(n_out, dim).bit_length() - min(n_in, dim).bit_length()
    partial = torch.empty(splits, batch, 2, dim, device=inputs.device, dtype=torch.float32)
    _fourier_sketch_kernel[(splits * batch,)](
        inputs, inputs_table, n_in, *inputs.stride(),
        grads, grads_table, n_out, *grads.stride(),
        tokens, share, bits, constants, partial,
        R1=r1, R2=r2, R3=r3, T=tile, num_warps=warps, num_stages=1,
    )  # fmt: skip
    squares = torch.complex(*added(partial)[..., place].unbind(1))
    # Z^2 = P^2 - Q^2 + 2i P Q with spectra of real rows: X[-w] = conj(X[w]) takes the first two away.
    mirrored = squares.flip(1).roll(1, 1).conj()
    sketch: Tensor = torch.fft.ifft((squares - mirrored) / 4j).real.contiguous()
    return sketch
