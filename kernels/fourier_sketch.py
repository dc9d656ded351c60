"""linear_sketch of 1,024 to 8,192 numbers: one complex Fourier transform a token, all in float32.

With p and q the count sketches of a token's two factors and Z the transform of p + i q, the sketch is the
inverse transform of the cross term in the sum of Z^2 (docs/reference/sketch.md). A program takes a share of
one example's tokens, one at a time. It loads both sides' elements in the order of their bins, transforms
K = H R1 R2 R3 numbers, by halves where H is 2, by products with the [R, R] matrices of shorter transforms (R3
may be 1), and adds Z^2 in the order in which the numbers come out. What is left is done once an example, in
torch.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapidin.kernels.count_sketch import count_sketch
from rapidin.kernels.sum_parts import added

# H, R1, R2 and R3, tokens that are transformed at a time, and warps, by dim. The matrices lie in shared
# memory, of which some GPUs without a CUDA kernel have 64 KB: so none is larger than 32 x 32.
_SIZES = {
    512: (1, 32, 16, 1, 1, 4),
    1024: (1, 32, 32, 1, 1, 4),
    2048: (2, 32, 32, 1, 1, 8),
    4096: (1, 16, 16, 16, 1, 8),
    8192: (2, 16, 16, 16, 1, 16),
}
DIMS = tuple(_SIZES)


@triton.jit
def _turned(re, im, roots_ptr, at, SIZE: tl.constexpr):
    """Complex numbers times the roots at their places: cosines, and `SIZE` numbers further their sines."""
    cos, sin = tl.load(roots_ptr + at), tl.load(roots_ptr + SIZE + at)
    return re * cos + im * sin, im * cos - re * sin


@triton.jit
def _product(re, im, matrix_ptr, R: tl.constexpr):
    """Rows of R complex numbers, [M, R] each, times the R x R matrix of their transform."""
    at = tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]
    cos, sin = tl.load(matrix_ptr + at), tl.load(matrix_ptr + R * R + at)
    real = tl.dot(re, cos, input_precision="tf32x3")
    real = tl.dot(im, sin, acc=real, input_precision="tf32x3")
    imaginary = tl.dot(im, cos, input_precision="tf32x3")
    imaginary = tl.dot(re, -sin, acc=imaginary, input_precision="tf32x3")
    return real, imaginary


@triton.jit
def _transformed(re, im, roots_ptr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr, T: tl.constexpr):
    """The transforms of T times R1 R2 R3 complex numbers, [T, R2 R3 R1]; roots: as `roots` lays them out."""
    M: tl.constexpr = R2 * R3
    turns = roots_ptr + 2 * R1 * R1
    second = turns + 2 * M * R1
    re, im = _product(tl.reshape(re, [T * M, R1]), tl.reshape(im, [T * M, R1]), roots_ptr, R1)
    at = tl.arange(0, M)[None, :, None] * R1 + tl.arange(0, R1)[None, None, :]
    re, im = _turned(tl.reshape(re, [T, M, R1]), tl.reshape(im, [T, M, R1]), turns, at, M * R1)
    if R3 == 1:
        re, im = tl.permute(re, [0, 2, 1]), tl.permute(im, [0, 2, 1])
        re, im = tl.reshape(re, [T * R1, R2]), tl.reshape(im, [T * R1, R2])
        re, im = _product(re, im, second, R2)
    else:
        re = tl.permute(tl.reshape(re, [T, R2, R3, R1]), [0, 2, 3, 1])
        im = tl.permute(tl.reshape(im, [T, R2, R3, R1]), [0, 2, 3, 1])
        re, im = tl.reshape(re, [T * R3 * R1, R2]), tl.reshape(im, [T * R3 * R1, R2])
        re, im = _product(re, im, second, R2)
        turns2 = second + 2 * R2 * R2
        at2 = tl.arange(0, R3)[None, :, None, None] * R2 + tl.arange(0, R2)[None, None, None, :]
        re, im = _turned(tl.reshape(re, [T, R3, R1, R2]), tl.reshape(im, [T, R3, R1, R2]), turns2, at2, M)
        re, im = tl.permute(re, [0, 2, 3, 1]), tl.permute(im, [0, 2, 3, 1])
        re, im = tl.reshape(re, [T * R1 * R2, R3]), tl.reshape(im, [T * R1 * R2, R3])
        re, im = _product(re, im, turns2 + 2 * M, R3)
    return re, im


@triton.jit
def _peak(x):
    return tl.max(tl.abs(x), axis=1)


@triton.jit
def _scales(peak_re, peak_im, bits):
    """Of Z^2 = P^2 - Q^2 + 2i P Q only the cross term is wanted: both sides of a token are brought to about
    the same length, by powers of two whose product is 1, and to nothing where one is nothing. A length is
    taken as that of as many numbers as the side has, all as large as the largest; bits: log2 of the ratio of
    these counts."""
    some = (peak_re > 0.0) & (peak_im > 0.0)
    larger = (peak_im.to(tl.int32, bitcast=True) >> 23) - (peak_re.to(tl.int32, bitcast=True) >> 23)
    shift = tl.minimum(tl.maximum((2 * larger + bits) >> 2, -126), 126)
    scale_re = tl.where(some, ((127 + shift) << 23).to(tl.float32, bitcast=True), 0.0)
    scale_im = tl.where(some, ((127 - shift) << 23).to(tl.float32, bitcast=True), 0.0)
    return scale_re[:, None], scale_im[:, None]


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
    halves_ptr,
    partial_ptr,
    H: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    T: tl.constexpr,
):
    N: tl.constexpr = R1 * R2 * R3
    K: tl.constexpr = H * N
    LAST: tl.constexpr = R2 if R3 == 1 else R3
    splits = tl.cdiv(tokens, share)
    split = tl.program_id(0) % splits
    batch = (tl.program_id(0) // splits).to(tl.int64)
    inputs_ptr += batch * stride_inputs_batch
    grads_ptr += batch * stride_grads_batch
    first = split * share
    end = tl.minimum(first + share, tokens)
    sums_re = tl.zeros([T * N // LAST, LAST], tl.float32)
    sums_im = tl.zeros([T * N // LAST, LAST], tl.float32)
    odd_re = tl.zeros([T * N // LAST, LAST], tl.float32)
    odd_im = tl.zeros([T * N // LAST, LAST], tl.float32)
    for token in range(first, end, T):
        re = count_sketch(
            inputs_ptr, inputs_table_ptr, token, end, n_in, stride_inputs_token, stride_inputs_element, 0,
            K, N, R1, T,
        )  # fmt: skip
        im = count_sketch(
            grads_ptr, grads_table_ptr, token, end, n_out, stride_grads_token, stride_grads_element, 0,
            K, N, R1, T,
        )  # fmt: skip
        if H == 1:
            scale_re, scale_im = _scales(_peak(re), _peak(im), bits)
            re, im = _transformed(re * scale_re, im * scale_im, roots_ptr, R1, R2, R3, T)
        else:  # the even numbers come of the halves' sum, the odd ones of their difference, turned
            half_re = count_sketch(
                inputs_ptr, inputs_table_ptr, token, end, n_in, stride_inputs_token, stride_inputs_element, N,
                K, N, R1, T,
            )  # fmt: skip
            half_im = count_sketch(
                grads_ptr, grads_table_ptr, token, end, n_out, stride_grads_token, stride_grads_element, N,
                K, N, R1, T,
            )  # fmt: skip
            peak_re = tl.maximum(_peak(re), _peak(half_re))
            peak_im = tl.maximum(_peak(im), _peak(half_im))
            scale_re, scale_im = _scales(peak_re, peak_im, bits)
            at = tl.arange(0, N)[None, :]
            x, y = _turned((re - half_re) * scale_re, (im - half_im) * scale_im, halves_ptr, at, N)
            re, im = (re + half_re) * scale_re, (im + half_im) * scale_im
            x, y = _transformed(x, y, roots_ptr, R1, R2, R3, T)
            odd_re += x * x - y * y
            odd_im += 2.0 * x * y
            re, im = _transformed(re, im, roots_ptr, R1, R2, R3, T)
        sums_re += re * re - im * im
        sums_im += 2.0 * re * im
    out_ptr = partial_ptr + (split.to(tl.int64) * (tl.num_programs(0) // splits) + batch) * (2 * K)
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.sum(tl.reshape(sums_re, [T, N]), 0))
    tl.store(out_ptr + K + at, tl.sum(tl.reshape(sums_im, [T, N]), 0))
    if H == 2:
        tl.store(out_ptr + N + at, tl.sum(tl.reshape(odd_re, [T, N]), 0))
        tl.store(out_ptr + K + N + at, tl.sum(tl.reshape(odd_im, [T, N]), 0))


@cache
def roots(h: int, r1: int, r2: int, r3: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines, float32, as the kernel reads them, and where it leaves which number: [K] int64.

    First the matrix [R1, R1] of the first transform, then what its results [R2 R3, R1] are multiplied by, the
    matrix of the second, and where there is a third what comes between them, [R3, R2], and its matrix. Apart
    from them those of the halves, in the order of a count sketch.
    """
    n = r1 * r2 * r3

    def pair(rows: Tensor, columns: Tensor, whole: int) -> list[Tensor]:
        angle = (torch.outer(rows, columns) % whole).double() * (2 * math.pi / whole)
        return [angle.cos().flatten(), angle.sin().flatten()]

    one, two, three = torch.arange(r1), torch.arange(r2), torch.arange(r3)
    pairs = pair(one, one, r1) + pair(torch.arange(r2 * r3), one, n) + pair(two, two, r2)
    if r3 > 1:
        pairs += pair(three, two, r2 * r3) + pair(three, three, r3)
    halves = pair((torch.arange(r2 * r3)[:, None] + one * (r2 * r3)).flatten(), torch.ones(1).long(), 2 * n)
    number = (one[:, None, None] + r1 * two[:, None] + r1 * r2 * three).flatten()  # by place
    numbers = torch.cat([h * number + half for half in range(h)])
    place = torch.empty_like(numbers)
    place[numbers] = torch.arange(h * n)
    return torch.cat(pairs).float().to(device), torch.cat(halves).float().to(device), place.to(device)


def fourier_sketch(
    inputs: Tensor, grads: Tensor, dim: int, inputs_table: Tensor, grads_table: Tensor, blocks: int = 256
) -> Tensor:
    """inputs: [B, T, I], grads: [B, T, O] -> [B, dim] float32; tables: rapidin.ops.tables.columns.

    dim: one of DIMS. blocks: about as many programs share the tokens; the sums' order depends on the sizes
    alone.
    """
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    h, r1, r2, r3, tile, warps = _SIZES[dim]
    tiles = triton.cdiv(tokens, tile)
    share = triton.cdiv(tiles, min(tiles, max(1, blocks // batch))) * tile
    splits = triton.cdiv(tokens, share)
    constants, halves, place = roots(h, r1, r2, r3, inputs.device)
    bits = min(n_out, dim).bit_length() - min(n_in, dim).bit_length()
    partial = torch.empty(splits, batch, 2, dim, device=inputs.device, dtype=torch.float32)
    _fourier_sketch_kernel[(splits * batch,)](
        inputs, inputs_table, n_in, *inputs.stride(),
        grads, grads_table, n_out, *grads.stride(),
        tokens, share, bits, constants, halves, partial,
        H=h, R1=r1, R2=r2, R3=r3, T=tile, num_warps=warps, num_stages=1,
    )  # fmt: skip
    squares = torch.complex(*added(partial)[..., place].unbind(1))
    # Z^2 = P^2 - Q^2 + 2i P Q with spectra of real rows: X[-w] = conj(X[w]) takes the first two away.
    mirrored = squares.flip(1).roll(1, 1).conj()
    sketch: Tensor = torch.fft.ifft((squares - mirrored) / 4j).real.contiguous()
    return sketch
