"""Flat sketch of a list of tensors in Triton: a program gathers the rows of one group of bins.

As in csrc/cuda/flat_sketch.cuh, with each element loaded by itself from its turned place in the row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapidin.kernels.sketch_hash import hash_word, signed_stream_key
from rapidin.kernels.sum_parts import added
from rapidin.kernels.tiles import grid

TURN, ROTATION, LANE, SIGNS = 9, 10, 11, 12  # streams of the hash
_TILE = 1024  # elements of the rows that a program takes at a time
_SIZES = ["tensors", "rows", "chunks", "chunks_of_part", "parts", "groups", "batch", "steps"]
_KEYS = [f"{name}_{half}" for name in ("turn", "rotation", "lane", "s0", "s1", "s2", "s3") for half in "ab"]


@triton.jit
def _words(index, key_a, key_b):
    return hash_word(index, key_a.to(tl.uint32, bitcast=True), key_b.to(tl.uint32, bitcast=True))


@triton.jit
def _elements(address, element, length, dtype, ELEMENT: tl.constexpr, NUMBER: tl.constexpr):
    """Those of one dtype, zeros in place of the others."""
    row = address.to(tl.pointer_type(ELEMENT))
    mine = element < tl.where(dtype == NUMBER, length, 0)[:, None]
    return tl.load(row[:, None] + element, mask=mine, other=0.0).to(tl.float32)


@triton.jit
def _column(words, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """words: [ROWS, COLUMNS] uint32 -> [ROWS]"""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == COLUMN)[None, :], words, 0), axis=1)


@triton.jit(do_not_specialize=[*_SIZES, *_KEYS])
def _flat_sketch_kernel(
    table_ptr, places_ptr, scales_ptr, sums_ptr, squares_ptr,
    tensors, rows, chunks, chunks_of_part, parts, groups, batch, steps,
    turn_a, turn_b, rotation_a, rotation_b, lane_a, lane_b,
    s0_a, s0_b, s1_a, s1_b, s2_a, s2_b, s3_a, s3_b,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HAS_FLOAT32: tl.constexpr, HAS_FLOAT16: tl.constexpr, HAS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    part = tl.program_id(0) // groups % parts
    example = (tl.program_id(0) // groups // parts).to(tl.int64)
    firsts_ptr = table_ptr + 4 * tensors
    part_tensors_ptr = table_ptr + 5 * tensors + 1 + part
    lowest, highest = tl.load(part_tensors_ptr).to(tl.int32), tl.load(part_tensors_ptr + 1).to(tl.int32)
    bins = tl.arange(0, WIDTH)
    COLUMNS: tl.constexpr = 2 if WIDTH <= 32 else 4 if WIDTH <= 64 else 8  # lane bits, one to four of signs
    column = tl.arange(0, COLUMNS)
    keys_a = tl.where(column == 0, lane_a, tl.where(column == 1, s0_a, s1_a))
    keys_a = tl.where(column == 3, s2_a, tl.where(column == 4, s3_a, keys_a))[None, :]
    keys_b = tl.where(column == 0, lane_b, tl.where(column == 1, s0_b, s1_b))
    keys_b = tl.where(column == 3, s2_b, tl.where(column == 4, s3_b, keys_b))[None, :]
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    first = part.to(tl.int64) * chunks_of_part
    count = (tl.minimum(first + chunks_of_part, chunks) - first).to(tl.int32)
    begin = 0
    while begin < count:  # older interpreters take no bounds of range() that are known only now
        step = begin + tl.arange(0, ROWS)
        chunk = first + step
        index = chunk.to(tl.uint32)
        permutation = (_words(index, turn_a, turn_b) & 15).to(tl.int64)
        rotation = (_words(index, rotation_a, rotation_b) % groups.to(tl.uint32)).to(tl.int32)
        at = tl.where(group >= rotation, group - rotation, group + groups - rotation)
        place = tl.load(places_ptr + permutation * groups + at)
        row = chunk * groups + place
        there = (step < count) & (row < rows)

        low = tl.zeros([ROWS], tl.int32) + lowest
        high = tl.zeros([ROWS], tl.int32) + highest
        halving = 0
        while halving < steps:
            middle = (low + high + 1) >> 1
            after = tl.load(firsts_ptr + middle) > row
            high = tl.where(after, middle - 1, high)
            low = tl.where(after, low, middle)
            halving += 1
        entry_ptr = table_ptr + low
        start = (row - tl.load(firsts_ptr + low)) * WIDTH
        address = tl.load(entry_ptr)
        offset = start + example * tl.load(entry_ptr + tensors)
        left = tl.load(entry_ptr + 2 * tensors) - start
        dtype = tl.load(entry_ptr + 3 * tensors).to(tl.int32)
        address += offset * tl.where(dtype == 0, 4, 2)
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + low)

        # A row's words side by side, so that each is made once: taken apart by sums, which the compiler does
        # not move past, as it would move their making to each of the row's elements.
        words = _words(row.to(tl.uint32)[:, None], keys_a, keys_b)
        turn = _column(words, 0, COLUMNS).to(tl.int32, bitcast=True) & (WIDTH - 1)
        element = bins[None, :] ^ turn[:, None]
        signs = tl.broadcast_to(_column(words, 1, COLUMNS)[:, None], [ROWS, WIDTH])
        for j in tl.static_range(1, (WIDTH + 31) // 32):
            signs = tl.where(element >= 32 * j, _column(words, 1 + j, COLUMNS)[:, None], signs)
        minus = (signs >> (element & 31).to(tl.uint32)) << 31

        length = tl.where(there, tl.minimum(left, WIDTH), 0).to(tl.int32)
        values = tl.zeros([ROWS, WIDTH], tl.float32)
        if HAS_FLOAT32:
            values += _elements(address, element, length, dtype, tl.float32, 0)
        if HAS_FLOAT16:
            values += _elements(address, element, length, dtype, tl.float16, 1)
        if HAS_BFLOAT16:
            values += _elements(address, element, length, dtype, tl.bfloat16, 2)
        if squares_ptr is not None:
            tl.store(squares_ptr + example * rows + row, tl.sum(values * values, axis=1), mask=there)
        signed = (values.to(tl.uint32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)
        if scales_ptr is not None:
            signed *= scale[:, None]
        sums += signed
        begin += ROWS
    place_of_sums = (part * batch + example) * groups + group
    tl.store(sums_ptr + place_of_sums * WIDTH + bins, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["tensors", "batch", "rows", "slices"])
def _flat_squares_kernel(
    firsts_ptr, row_squares_ptr, squares_ptr, tensors, batch, rows, slices, BLOCK: tl.constexpr
):
    slice_ = tl.program_id(0) % slices
    tensor = tl.program_id(0) // slices % tensors
    example = (tl.program_id(0) // slices // tensors).to(tl.int64)
    first = tl.load(firsts_ptr + tensor)
    count = tl.load(firsts_ptr + tensor + 1) - first
    begin, end = first + count * slice_ // slices, first + count * (slice_ + 1) // slices
    sums = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        row = begin + tl.arange(0, BLOCK)
        sums += tl.load(row_squares_ptr + example * rows + row, mask=row < end, other=0.0)
        begin += BLOCK
    tl.store(squares_ptr + (slice_ * batch + example) * tensors + tensor, tl.sum(sums, axis=0))


def flat_sketch(
    plan: Any, places: Tensor, seed: int, scales: Tensor | None, squares: bool
) -> tuple[Tensor, Tensor | None]:
    """-> [B, dim] float32 and, with squares, each tensor's squared length, [B, n] float32.

    plan: the `FlatPlan` of the tensors; places: [16, groups] int32 from tables.places; scales: [n] float32,
    contiguous. Rows and batch are not 0.
    """
    device, n = plan.table.device, len(plan.tensors)
    dim = plan.groups * plan.width
    sums = torch.empty(plan.parts, plan.batch, dim, dtype=torch.float32, device=device)
    row_squares = torch.empty(plan.batch, plan.rows, dtype=torch.float32, device=device) if squares else None
    keys = [
        half for s in (TURN, ROTATION, LANE, *range(SIGNS, SIGNS + 4)) for half in signed_stream_key(seed, s)
    ]
    known = {x.dtype for x in plan.tensors}
    _flat_sketch_kernel[grid("flat_sketch", plan.groups * plan.parts * plan.batch)](
        plan.table, places, scales, sums, row_squares,
        n, plan.rows, plan.chunks, plan.chunks_of_part, plan.parts, plan.groups, plan.batch, plan.steps,
        *keys,
        WIDTH=plan.width, ROWS=min(_TILE // plan.width, 1024),
        HAS_FLOAT32=torch.float32 in known, HAS_FLOAT16=torch.float16 in known,
        HAS_BFLOAT16=torch.bfloat16 in known, num_warps=2, maxnreg=160 if squares or len(known) > 1 else 128,
    )  # fmt: skip
    sketch = added(sums)
    if row_squares is None:
        return sketch, None
    found = torch.empty(plan.slices, plan.batch, n, dtype=torch.float32, device=device)
    _flat_squares_kernel[grid("flat_sketch", plan.slices * n * plan.batch)](
        plan.table[4 * n :], row_squares, found, n, plan.batch, plan.rows, plan.slices, BLOCK=1024
    )
    return sketch, added(found)
