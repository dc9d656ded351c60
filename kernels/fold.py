"""Wrapped-diagonal sums of matrices in Triton: the last step of a TensorSketch.

    out[b, (row_bin(r) + column_bin(c)) mod k] += row_sign(r) * column_sign(c) * matrix[b, r, c]

A program owns some bins and gathers what goes there: of a row and a chunk of k columns, one element a bin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapidin.kernels.sum_parts import sum_parts

# How the rows are cut into parts depends on sizes alone, so that every machine adds in the same order.
_BLOCKS = 2048
_TILE = 1024  # elements that a program takes at a time
_LEAST_TILES = 4  # in a part
_SIZES = [
    "batch",
    "rows",
    "cols",
    "chunks",
    "k",
    "stride_batch",
    "stride_row",
    "stride_col",
    "row_table_stride",
]


@triton.jit(do_not_specialize=[*_SIZES, "items_of_part"])
def _fold_kernel(
    matrix_ptr, row_table_ptr, column_table_ptr, out_ptr,
    batch, rows, cols, chunks, k, stride_batch, stride_row, stride_col, row_table_stride, items_of_part,
    ITEMS: tl.constexpr, BINS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    bins = tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS)
    part, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    items = rows.to(INDEX) * chunks  # an item is a row's chunk of columns
    sums = tl.zeros([ITEMS, BINS], tl.float32)
    begin = 0
    while begin < items_of_part:  # older interpreters take no bounds of range() that are known only now
        step = begin + tl.arange(0, ITEMS)
        item = (part * items_of_part + step).to(INDEX)
        there = (step < items_of_part) & (item < items)
        row, chunk = (item // chunks).to(tl.int64), (item % chunks).to(tl.int64)
        if row_table_ptr is not None:
            entry = tl.load(row_table_ptr + b * row_table_stride + row, mask=there, other=0)
            row_bin = (entry & 0x7FFFFFFF).to(tl.int64)
            row_minus = (entry < 0)[:, None]
        else:
            row_bin = row
            row_minus = tl.zeros([ITEMS, 1], tl.int1)
        wanted = bins[None, :] - (row_bin % k)[:, None]  # the column's bin
        wanted = tl.where(wanted < 0, wanted + k, wanted)
        mask = there[:, None] & (bins < k)[None, :]
        if column_table_ptr is not None:
            entries = tl.load(column_table_ptr + (chunk * k)[:, None] + wanted, mask=mask, other=0)
            column = (chunk * k)[:, None] + (entries & 0x7FFFFFFF)
            minus = (entries < 0) != row_minus
        else:
            column = (chunk * k)[:, None] + wanted
            minus = row_minus
        place = b * stride_batch + (row * stride_row)[:, None] + column * stride_col
        values = tl.load(matrix_ptr + place, mask=mask & (column < cols), other=0.0).to(tl.float32)
        sums += tl.where(minus, -values, values)
        begin += ITEMS
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + (part * batch + b) * k + bins, total, mask=bins < k)


def fold(matrices: Tensor, row_table: Tensor | None, column_table: Tensor | None, k: int) -> Tensor:
    """matrices: [B, R, C] float32, float16 or bfloat16, any strides -> [B, k] float32

    row_table: [R] or [B, R] int32 as from tables.rows, None: row r has bin r mod k
    column_table: as from tables.columns, None: column c has bin c mod k
    """
    batch, rows, cols = matrices.shape
    if not matrices.numel():
        return torch.zeros(batch, k, dtype=torch.float32, device=matrices.device)
    width = min(triton.next_power_of_2(k), 256)
    tile = max(_TILE // width, 1)
    chunks = -(-cols // k)
    items = rows * chunks
    blocks = -(-k // width)
    wanted = max(min(-(-_BLOCKS // (blocks * batch)), -(-items // (tile * _LEAST_TILES))), 1)
    items_of_part = -(-items // wanted)
    parts = -(-items // items_of_part)
    row_table = row_table.contiguous() if row_table is not None else None
    row_table_stride = rows if row_table is not None and row_table.ndim == 2 else 0
    per_launch = 65535  # examples: the limit of a grid's last axis
    out = torch.empty(batch, k, dtype=torch.float32, device=matrices.device)
    for first in range(0, batch, per_launch):
        some = matrices[first : first + per_launch]
        table = (
            row_table[first : first + per_launch] if row_table_stride and row_table is not None else row_table
        )
        sums = out[first : first + per_launch]
        partial = (
            torch.empty(parts, *sums.shape, dtype=torch.float32, device=out.device) if parts > 1 else sums
        )
        _fold_kernel[(blocks, parts, len(some))](
            some, table, column_table, partial,
            len(some), rows, cols, chunks, k, *some.stride(), row_table_stride, items_of_part,
            ITEMS=tile, BINS=width, INDEX=tl.int32 if items < 2**30 else tl.int64,
        )  # fmt: skip
        if parts > 1:
            sum_parts(partial, sums)
    return out
