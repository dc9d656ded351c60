"""pack and unpack in Triton: rows of floats to 8-bit, 4-bit or 1-bit codes with a scale each, and back.

The layout and the choice of codes are those of rapidin.ops.packed. A tile is [rows, planes, bytes]: the
numbers that share a byte are one column of it, so a byte is made by one thread, without exchange. Sums are in
float64, since the squares of float32 leave its range at both ends; that is one multiply-add a number, far
below what the reads take.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import grid, power_of_two

NUMBERS = {"int8": 1, "int4": 2, "sign": 8}  # a byte
_TILE = 2048  # numbers of a tile, at most


@triton.jit
def _places(first, bytes_in_row, width, P: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr):
    """Of the bytes first .. first + BYTES of a row: the number in each plane [P, BYTES], and whether there is
    one.

    EVEN: the row is whole groups, so that the compiler sees how numbers are aligned.
    """
    byte = first + tl.arange(0, BYTES)
    group = byte // 64
    if EVEN:
        in_group = tl.arange(0, P)[:, None] * 64 + (byte % 64)[None, :]
    else:
        size = tl.minimum(bytes_in_row - group * 64, 64)  # the last group is shorter
        in_group = tl.arange(0, P)[:, None] * size[None, :] + (byte % 64)[None, :]
    number = (group * (64 * P))[None, :] + in_group
    there = (byte < bytes_in_row)[None, :] & (number < width)
    return number, there


@triton.jit
def _pack_kernel(
    x_ptr, codes_ptr, scale_ptr, n, width, bytes_in_row, stride_row,
    P: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n
    x_rows = x_ptr + row[:, None, None] * stride_row
    out_rows = codes_ptr + row[:, None] * bytes_in_row
    squares = tl.zeros((ROWS, P, BYTES), tl.float64)
    sizes = tl.zeros((ROWS, P, BYTES), tl.float64)
    largest = tl.zeros((ROWS, P, BYTES), tl.float32)
    for tile in range(TILES):
        first = tl.full((), BYTES, INDEX) * tile
        number, there = _places(first, bytes_in_row, width, P, BYTES, EVEN)
        mask = live[:, None, None] & there[None]
        x = tl.load(x_rows + number[None], mask=mask, other=0.0).to(tl.float32)
        wide = x.to(tl.float64)
        squares += wide * wide
        if P == 8:
            sizes += tl.abs(wide)
            bits = ((x >= 0) & mask).to(tl.int32) << tl.arange(0, P)[None, :, None]
            at = first + tl.arange(0, BYTES)
            tl.store(
                out_rows + at[None, :],
                tl.sum(bits, 1).to(tl.uint8),
                mask=live[:, None] & (at < bytes_in_row)[None, :],
            )
        if P == 1:
            largest = tl.maximum(largest, tl.abs(x))
    square = tl.sum(tl.sum(squares, 2), 1)
    broken = (square != square) | (square == float("inf"))
    zero = tl.zeros((ROWS,), tl.float64)
    one = zero + 1.0
    if P == 8:
        dot = tl.sum(tl.sum(sizes, 2), 1)
        if tl.max(broken.to(tl.int32), 0) != 0:
            # Codes were written before it was known that the row cannot be scored; whose thread wrote a byte
            # is the compiler's choice.
            tl.debug_barrier()
            for tile in range(TILES):
                first = tl.full((), BYTES, INDEX) * tile
                at = first + tl.arange(0, BYTES)
                tl.store(
                    out_rows + at[None, :],
                    tl.zeros((ROWS, BYTES), tl.uint8),
                    mask=(live & broken)[:, None] & (at < bytes_in_row)[None, :],
                )
    else:
        if P == 1:
            step = tl.max(tl.max(largest, 2), 1).to(tl.float64) / 127.0
        else:
            step = tl.full((), 0.3352, tl.float64) * tl.sqrt(square / width)
        # As csrc/cpu/pack.h: in float32, tiny rows lifted by 2^100 so that the inverse of their step is
        # normal.
        good = (step > 0) & (broken == 0)
        tiny = good & (step < 7.888609052210118e-31)
        lift = tl.where(tiny, 1.2676506002282294e30, 1.0).to(tl.float32)
        inverse = tl.where(good, one / tl.where(good, step * lift.to(tl.float64), one), zero).to(tl.float32)
        dots = tl.zeros((ROWS, P, BYTES), tl.float64)
        for tile in range(TILES):
            first = tl.full((), BYTES, INDEX) * tile
            number, there = _places(first, bytes_in_row, width, P, BYTES, EVEN)
            mask = (live & (broken == 0))[:, None, None] & there[None]
            x = tl.load(x_rows + number[None], mask=mask, other=0.0).to(tl.float32)
            y = x * lift[:, None, None] * inverse[:, None, None]
            at = first + tl.arange(0, BYTES)
            store = live[:, None] & (at < bytes_in_row)[None, :]
            if P == 2:
                low = tl.minimum(tl.maximum(tl.floor(y), -8.0), 7.0)
                value = low + 0.5
                nibbles = tl.where(mask, low.to(tl.int32) + 8, 0) << (tl.arange(0, P) * 4)[None, :, None]
                tl.store(out_rows + at[None, :], tl.sum(nibbles, 1).to(tl.uint8), mask=store)
            else:
                y = tl.minimum(tl.maximum(y, -127.0), 127.0)
                value = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: the nearest integer, halves to even
                tl.store(out_rows + at[None, :], tl.sum(value.to(tl.int32), 1).to(tl.int8), mask=store)
            dots += x.to(tl.float64) * value.to(tl.float64)
        dot = tl.sum(tl.sum(dots, 2), 1)
    scored = (square > 0) & (broken == 0)
    scale = tl.where(scored, square / tl.where(scored, dot, one), zero).to(tl.float32)
    tl.store(scale_ptr + row, tl.where(broken, float("nan"), scale), mask=live)


@triton.jit
def _unpack_kernel(
    codes_ptr, scale_ptr, out_ptr, n, width, bytes_in_row, stride_row, stride_scale,
    P: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(bytes_in_row, BYTES)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n
    first = (tl.program_id(0) % tiles).to(INDEX) * BYTES
    number, there = _places(first, bytes_in_row, width, P, BYTES, EVEN)
    at = first + tl.arange(0, BYTES)
    codes = tl.load(
        codes_ptr + row[:, None] * stride_row + at[None, :],
        mask=live[:, None] & (at < bytes_in_row)[None, :],
        other=0,
    ).to(tl.int32)
    if P == 8:
        value = ((codes[:, None, :] >> tl.arange(0, P)[None, :, None] & 1) * 2 - 1).to(tl.float32)
    elif P == 2:
        value = (codes[:, None, :] >> (tl.arange(0, P) * 4)[None, :, None] & 15).to(tl.float32) - 7.5
    else:
        value = codes[:, None, :].to(tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr + row * stride_scale, mask=live, other=0.0).to(tl.float32)
        value = value * scale[:, None, None]
    to = out_ptr + row[:, None, None] * width + number[None]
    tl.store(to, value, mask=live[:, None, None] & there[None])


def _tile(n: int, size: int, planes: int) -> tuple[int, int]:
    """(rows, bytes) of a tile: as much of a row as fits, or several short rows."""
    bytes_ = min(_TILE // planes, power_of_two(size))
    rows = min(max(1, _TILE // (planes * bytes_)), 8, power_of_two(n))
    return rows, bytes_


def _index(width: int) -> tl.dtype:
    """The type in which a row's numbers are counted, tiles beyond its end included."""
    return tl.int32 if width < 2**31 - 2**16 else tl.int64


def pack(x: Tensor, codes: Tensor, scale: Tensor, dtype: str) -> None:
    """Rows to codes; every byte of codes and scale is written.

    x: [N, W] float32, float16 or bfloat16, its last stride 1; codes: [N, bytes] int8 or uint8, contiguous, in
    the layout of rapidin.ops.Packed; scale: [N] float32
    """
    (n, width), size, planes = x.shape, codes.shape[1], NUMBERS[dtype]
    if not n:
        return
    rows, bytes_ = _tile(n, size, planes)
    _pack_kernel[grid("pack", triton.cdiv(n, rows))](
        x, codes, scale, n, width, size, x.stride(0), P=planes, ROWS=rows, BYTES=bytes_,
        TILES=triton.cdiv(size, bytes_), EVEN=width % (64 * planes) == 0, INDEX=_index(width), num_warps=4,
    )  # fmt: skip


def unpack(codes: Tensor, scale: Tensor | None, out: Tensor, dtype: str) -> None:
    """The numbers of packed rows.

    codes: [N, bytes] int8 or uint8, its last stride 1; scale: [N] float32, float16 or None; out: [N, W]
    float32, contiguous
    """
    (n, width), size, planes = out.shape, codes.shape[1], NUMBERS[dtype]
    if not n or not width:
        return
    rows, bytes_ = _tile(n, size, planes)
    _unpack_kernel[grid("unpack", triton.cdiv(n, rows) * triton.cdiv(size, bytes_))](
        codes, codes if scale is None else scale, out, n, width, size, codes.stride(0),
        0 if scale is None else scale.stride(0),
        P=planes, ROWS=rows, BYTES=bytes_, EVEN=width % (64 * planes) == 0, SCALED=scale is not None,
        INDEX=_index(width), num_warps=4,
    )  # fmt: skip
