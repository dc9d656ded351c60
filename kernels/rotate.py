"""The randomized Hadamard rotation of blocks, and blocks scaled to length 1, in Triton.

The Hadamard transform of a block takes two or three passes, each over four or five bits of a number's place:
a product with a matrix of 1 and -1, on tensor cores. Those take bfloat16; a float32 is the sum of three,
exactly, so each product is three, summed in float32. A tile is a block of several rows, so that signs are
made once for many of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sketch_hash import hash_word, signed_stream_key
from .tiles import grid, power_of_two

STREAM = 16  # of the keyed hash in docs/reference/sketch.md
WIDEST = 8192
_TILE = 4096  # numbers of a tile, but for a wider block
_ROWS = 64  # of a program, at most


@triton.jit
def _hadamard(SIZE: tl.constexpr, SKIP: tl.constexpr, INTERPRETED: tl.constexpr):
    """[SIZE, SIZE]: the transform of an index's bits but the lowest, log2(SKIP) of them; SIZE <= 256.

    1 or -1, by whether the indices have an even number of those bits in common; 0 where the lowest bits
    differ.
    """
    one, other = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    common = (one & other) // SKIP
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    entry = 1.0 - 2.0 * (common & 1).to(tl.float32)
    return _operand(tl.where((one ^ other) % SKIP == 0, entry, 0.0), INTERPRETED)


@triton.jit
def _operand(x, INTERPRETED: tl.constexpr):
    """x as bfloat16. The interpreter multiplies the bits of bfloat16: it gets the same numbers in float32."""
    x = x.to(tl.bfloat16)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _product(matrix, x, INTERPRETED: tl.constexpr):
    """matrix x, in float32: x as a sum of three bfloat16."""
    high = _operand(x, INTERPRETED)
    rest = x - high.to(tl.float32)
    middle = _operand(rest, INTERPRETED)
    low = _operand(rest - middle.to(tl.float32), INTERPRETED)
    y = tl.dot(matrix, high)
    y = tl.dot(matrix, middle, y)
    return tl.dot(matrix, low, y)


@triton.jit
def _flip(x, words):
    """x with its sign flipped where the top bit of the word is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (words & tl.full((), 0x80000000, tl.uint32))).to(
        tl.float32, bitcast=True
    )


@triton.jit(do_not_specialize=["key_a", "key_b"])
def _rotate_kernel(
    x_ptr, mean_ptr, begin_ptr, size_ptr, out_ptr,
    n, blocks, stride_row, stride_block, stride_out, key_a, key_b, factor,
    WIDTH: tl.constexpr, A: tl.constexpr, C: tl.constexpr, SKIP: tl.constexpr, B: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, INVERSE: tl.constexpr, CENTRED: tl.constexpr, CUT: tl.constexpr,
    SIZED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Numbers of a line of the first pass; a small block is padded to what the last one takes.
    IN: tl.constexpr = B if A == 1 else WIDTH // A
    block = tl.program_id(0) % blocks
    begin = block.to(tl.int64) * WIDTH
    count = WIDTH
    if CUT:
        begin = tl.load(begin_ptr + block)
        count = (tl.load(begin_ptr + block + 1) - begin).to(tl.int32)
        if count == 0:
            return
    if SIZED:
        factor = factor / tl.load(size_ptr + block)
    # In: element [a, r * IN + i] is number a * IN + i of row r. Out: [b, (a * ROWS + r) * (IN / B) + i] is
    # number a * IN + i * B + b.
    column = tl.arange(0, ROWS * IN)
    number_in = tl.arange(0, A)[:, None] * IN + (column % IN)[None, :]
    row_in = (column // IN)[None, :]
    column = tl.arange(0, A * ROWS * (IN // B))
    line = column // (IN // B)
    number_out = tl.arange(0, B)[:, None] + (line // ROWS * IN + column % (IN // B) * B)[None, :]
    row_out = (line % ROWS)[None, :]
    word = block * WIDTH + (number_out if INVERSE else number_in)
    key_a, key_b = key_a.to(tl.uint32, bitcast=True), key_b.to(tl.uint32, bitcast=True)
    words = hash_word(word.to(tl.uint32), key_a, key_b)
    in_block = number_in < WIDTH
    if CENTRED:
        mean = tl.load(mean_ptr + block.to(tl.int64) * WIDTH + number_in, mask=in_block, other=0.0)
    for tile in range(TILES):
        first = ((tl.program_id(0) // blocks).to(tl.int64) * TILES + tile) * ROWS
        from_row = first + row_in
        x = tl.load(
            x_ptr + from_row * stride_row + block.to(tl.int64) * stride_block + number_in,
            mask=in_block & (from_row < n),
            other=0.0,
        )
        if CENTRED:
            x -= mean
        if not INVERSE:
            x = _flip(x, words)
        if A > 1:
            x = _product(_hadamard(A, 1, INTERPRETED), x, INTERPRETED)
        if C > 1:
            x = tl.permute(tl.reshape(x, (A * ROWS, C, IN // C)), (1, 0, 2))
            x = tl.reshape(x, (C, A * ROWS * (IN // C)))
            x = _product(_hadamard(C, SKIP, INTERPRETED), x, INTERPRETED)
            x = tl.permute(tl.reshape(x, (C, A * ROWS, IN // C)), (1, 0, 2))
        x = tl.trans(tl.reshape(x, (A * ROWS * (IN // B), B)))
        y = _product(_hadamard(B, 1, INTERPRETED), x, INTERPRETED) * factor
        if INVERSE:
            y = _flip(y, words)
        to_row = first + row_out
        tl.store(
            out_ptr + to_row * stride_out + begin + number_out, y, mask=(number_out < count) & (to_row < n)
        )


def _passes(width: int) -> tuple[int, int, int, int]:
    """(A, C, SKIP, B): the sizes of the passes over a block's high, middle and low bits, 1: none.

    Tensor cores take matrices of 16 lines or more, and larger ones than 32 fill the registers. Of 2^11
    numbers the middle pass has 2 bits to do, and takes 2 of the lowest pass's along.
    """
    if width <= 128:
        return 1, 1, 1, max(16, width)
    known = {256: (16, 1, 1, 16), 512: (16, 1, 1, 32), 1024: (32, 1, 1, 32), 2048: (16, 16, 4, 32)}
    return known.get(width, (16, 16, 1, width // 256))


def rotate(
    x: Tensor,
    out: Tensor,
    *,
    seed: int,
    inverse: bool,
    mean: Tensor | None,
    begin: Tensor | None,
    size: Tensor | None,
) -> None:
    """Blocks rotated: signs, then the normalized Hadamard transform; inverse: the transform, then the signs.

    x: [n, blocks, width] float32, its last stride 1, width a power of two up to 8,192; mean: [blocks, width]
    float32, contiguous, subtracted first; begin: [blocks + 1] int64, block b keeps its first begin[b + 1] -
    begin[b] numbers, in out from begin[b] on, None: all; size: [blocks] float32, by which they are divided;
    out: [n, kept] float32, its last stride 1
    """
    n, blocks, width = x.shape
    if not n or not blocks:
        return
    a, c, skip, b = _passes(width)
    tile = max(width, a * b)
    if a == 1:  # tensor cores take 16 columns or more; one large matrix leaves fewer registers for rows
        rows = min(64, max(16, min(_TILE // 2 // tile, power_of_two(n))))
    else:
        rows = max(1, min(_TILE // tile, power_of_two(n)))
    tiles = max(1, min(_ROWS // rows, triton.cdiv(n, rows)))
    _rotate_kernel[grid("rotate", blocks * triton.cdiv(n, rows * tiles))](
        x, x if mean is None else mean, x if begin is None else begin, x if size is None else size, out,
        n, blocks, x.stride(0), x.stride(1), out.stride(0), *signed_stream_key(seed, STREAM), width**-0.5,
        WIDTH=width, A=a, C=c, SKIP=skip, B=b, ROWS=rows, TILES=tiles,
        INVERSE=inverse, CENTRED=mean is not None, CUT=begin is not None, SIZED=size is not None,
        INTERPRETED=x.device.type == "cpu",
        num_warps=8 if a == 1 else min(16, max(4, tile * rows // 512)), num_stages=1,
    )  # fmt: skip


@triton.jit
def _unit_kernel(
    x_ptr, unit_ptr, length_ptr, n, width, stride_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < n)[:, None]
    x_rows = x_ptr + row[:, None] * stride_row
    out_rows = unit_ptr + row[:, None] * width
    at = tl.arange(0, BLOCK)[None, :]
    if TILES == 1:  # held on chip between the sum and the division
        x = tl.load(x_rows + at, mask=live & (at < width), other=0.0).to(tl.float32)
        wide = x.to(tl.float64)
        square = tl.sum(wide * wide, 1)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float64)
        for tile in range(TILES):
            first = tl.full((), BLOCK, tl.int64) * tile
            wide = tl.load(x_rows + first + at, mask=live & (first + at < width), other=0.0).to(tl.float64)
            squares += wide * wide
        square = tl.sum(squares, 1)
    length = tl.sqrt(square).to(tl.float32)
    by = tl.where(length > 0, length, 1.0)[:, None]
    if TILES == 1:
        tl.store(out_rows + at, x / by, mask=live & (at < width))
    else:
        for tile in range(TILES):
            first = tl.full((), BLOCK, tl.int64) * tile
            mask = live & (first + at < width)
            x = tl.load(x_rows + first + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_rows + first + at, x / by, mask=mask)
    tl.store(length_ptr + row, length, mask=row < n)


def unit_blocks(x: Tensor, unit: Tensor, length: Tensor) -> None:
    """Blocks scaled to length 1, and their lengths; a block of zeros stays zero.

    x: [n, width] float32, float16 or bfloat16, its last stride 1; unit: [n, width] float32, contiguous;
    length: [n] float32
    """
    n, width = x.shape
    if not n:
        return
    block = min(power_of_two(width), WIDEST)
    rows = min(max(1, 2048 // block), power_of_two(n))
    _unit_kernel[grid("unit_blocks", triton.cdiv(n, rows))](
        x, unit, length, n, width, x.stride(0),
        ROWS=rows, BLOCK=block, TILES=triton.cdiv(width, block), num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
