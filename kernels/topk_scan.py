"""topk_scan in Triton: products of rows and queries, and the best of them.

A key is better if it is larger, whichever end is wanted: the score's bits in ascending order above 31 bits
of the row's index descending; 0 is none. A program appends keys that beat its k-th to a list of its own and
cuts the list to the best k when it is full, so a row that is no hit costs a comparison. Two keys are never
equal, so in which order they came does not count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers or bytes summed in 32 bits: 128 * 4095 * 2048 fits, and floats lose little
FLUSH = tl.constexpr(2048)
FEW = 4  # queries that are multiplied without tensor cores
STEP = 64  # bytes of packed rows with blocks that one step is a plane of
SEGMENT = 3  # ints: first and last number, block
MERGED = 1024  # keys that the merge takes at a time


@triton.jit
def _keys(score, row, SMALLEST: tl.constexpr):
    """score: [R, Q] float32, row: [R] -> [R, Q] int64, 0 where the score is NaN."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    ascending = tl.where(bits < 0, ~bits, bits | (-2147483648)).to(tl.int64) & 0xFFFFFFFF
    if SMALLEST:
        ascending = ascending ^ 0xFFFFFFFF
    key = (ascending << 31) | (0x7FFFFFFF - row.to(tl.int64))[:, None]
    return tl.where(score == score, key, 0)


@triton.jit
def _sorted(keys, SIZE: tl.constexpr):
    """keys: [SIZE], a power of two -> the same, descending.

    A bitonic sort whose loops are not unrolled, which tl.sort's are: it compiles in a moment, and has one
    exchange through shared memory a step.
    """
    place = tl.arange(0, SIZE)
    run = 2
    while run <= SIZE:
        step = run // 2
        while step > 0:
            other = tl.gather(keys, place ^ step, 0)
            descending = (place & run) == 0
            first = (place & step) == 0
            keys = tl.where(descending == first, tl.maximum(keys, other), tl.minimum(keys, other))
            step = step // 2
        run = run * 2
    return keys


@triton.jit
def _cut(counts, least, lists_ptr, stride, least_ptr, limit, k, CAPACITY: tl.constexpr, Q: tl.constexpr):
    """Leave the best k of the lists with more than `limit` keys. counts, least: [Q]; lists_ptr: the program's
    lists, `stride` keys apart; least_ptr: what all programs share."""
    number = tl.arange(0, Q)
    place = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # what other threads have appended
    for q in range(Q):
        count = tl.sum(tl.where(number == q, counts, 0))
        if count > limit:
            list_ptr = lists_ptr + q * stride
            keys = _sorted(tl.load(list_ptr + place, mask=place < count, other=0), CAPACITY)
            tl.debug_barrier()  # all have read
            tl.store(list_ptr + place, keys, mask=place < k)
            if count >= k:
                # The k-th best of some rows bounds the k-th best of all, so programs may tell each other.
                own = tl.sum(tl.where(place == k - 1, keys, 0))
                shared_ptr = least_ptr + q * (stride // CAPACITY)
                own = tl.maximum(own, tl.atomic_max(shared_ptr, own))
                least = tl.where(number == q, own, least)
            counts = tl.where(number == q, tl.minimum(count, k), counts)
    tl.debug_barrier()
    return counts, least


@triton.jit
def _keep(
    keys, counts, least, lists_ptr, stride, least_ptr, k,
    CAPACITY: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Append keys [R, Q] that beat `least` [Q] to the lists, each of which has room for R."""
    better = keys > least[None, :]
    found = better.to(tl.int32)
    if tl.max(found) > 0:
        # A scan of one axis: Triton 3.6 cannot compile one down the columns of a narrow tile.
        flat = tl.reshape(tl.trans(found), [Q * R])
        before = tl.reshape(tl.cumsum(flat, 0) - flat, [Q, R])
        place = tl.trans(before - tl.min(before, 1)[:, None]) + counts[None, :]
        tl.store(lists_ptr + tl.arange(0, Q)[None, :] * stride + place, keys, mask=better)
        counts += tl.sum(found, 0)
        if tl.max(counts) > CAPACITY - R:
            counts, least = _cut(
                counts, least, lists_ptr, stride, least_ptr, CAPACITY - R, k, CAPACITY=CAPACITY, Q=Q
            )
    return counts, least


@triton.jit
def _load_rows(rows_ptr, row, stride_row, column, end):
    at = rows_ptr + row[:, None] * stride_row + column[None, :]
    return tl.load(at, mask=(column < end)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _float_products(
    rows_ptr, row, stride_row, queries_ptr, first_query, begin, end, width, padded,
    R: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """<row, query> over numbers [begin, end) -> [R, Q] float64.

    Queries are [padded, width] float32 where TERMS is 0; else [TERMS, padded, width] of the cache's dtype,
    which add up to them.
    """
    query = first_query + tl.arange(0, Q)
    total = tl.zeros([R, Q], tl.float64)
    for flush in range(begin, end, FLUSH):
        stop = tl.minimum(flush + FLUSH, end)
        if TERMS == 0:
            products = tl.zeros([Q, R, D], tl.float32)
            for d in range(flush, stop, D):
                column = d + tl.arange(0, D)
                x = _load_rows(rows_ptr, row, stride_row, column, stop).to(tl.float32)
                inside = (column < stop)[None, :] & (query < padded)[:, None]
                at = queries_ptr + query[:, None].to(tl.int64) * width + column[None, :]
                y = tl.load(at, mask=inside, other=0.0)
                products += x[None, :, :] * y[:, None, :]
            total += tl.trans(tl.sum(products, 2)).to(tl.float64)
        else:
            sums = tl.zeros([R, Q], tl.float32)
            for d in range(flush, stop, D):
                column = d + tl.arange(0, D)
                x = _load_rows(rows_ptr, row, stride_row, column, stop)
                for term in tl.static_range(TERMS):
                    at = queries_ptr + (term * padded + query)[None, :].to(tl.int64) * width + column[:, None]
                    y = tl.load(at, mask=(column < stop)[:, None], other=0.0)
                    if x.dtype == tl.float32:
                        sums = tl.dot(x, y, sums, input_precision="tf32x3")
                    elif x.dtype == tl.bfloat16:  # exact in tf32 too; the interpreter has no dot of bfloat16
                        sums = tl.dot(x.to(tl.float32), y.to(tl.float32), sums, input_precision="tf32")
                    else:
                        sums = tl.dot(x, y, sums)
            total += sums.to(tl.float64)
    return total


@triton.jit
def _integer_products(
    rows_ptr, row, stride_row, queries_ptr, first_query, width, padded,
    R: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, PLANES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sums of codes times integers over the `width` bytes of a row -> [R, Q] float64, exact.

    Queries are [planes, padded, width]: of "sign" (PLANES 8) and "int4" (2) what each byte's plane is
    multiplied with; of "int8" (1) the integers, or with DOT their low and high parts.
    """
    MASK: tl.constexpr = (1 << (8 // PLANES)) - 1
    query = first_query + tl.arange(0, Q)
    total = tl.zeros([R, Q], tl.float64)
    for flush in range(0, width, FLUSH):
        stop = tl.minimum(flush + FLUSH, width)
        if DOT:
            sums = tl.zeros([R, Q], tl.int32)
            high = tl.zeros([R, Q], tl.int32)
        else:
            products = tl.zeros([Q, R, D], tl.int32)
        for d in range(flush, stop, D):
            column = d + tl.arange(0, D)
            x = _load_rows(rows_ptr, row, stride_row, column, stop)
            for plane in tl.static_range(2 if DOT and PLANES == 1 else PLANES):
                of_plane = queries_ptr + (plane * padded + query).to(tl.int64) * width
                codes = x if PLANES == 1 else ((x >> (plane * (8 // PLANES))) & MASK).to(tl.int8)
                if DOT:
                    at = of_plane[None, :] + column[:, None]
                    y = tl.load(at, mask=(column < stop)[:, None], other=0)
                    if PLANES == 1 and plane == 1:
                        high = tl.dot(codes, y, high, out_dtype=tl.int32)
                    else:
                        sums = tl.dot(codes, y, sums, out_dtype=tl.int32)
                else:
                    at = of_plane[:, None] + column[None, :]
                    inside = (column < stop)[None, :] & (query < padded)[:, None]
                    y = tl.load(at, mask=inside, other=0).to(tl.int32)
                    products += codes.to(tl.int32)[None, :, :] * y[:, None, :]
        if DOT:
            total += (sums + 64 * high).to(tl.float64)
        else:
            total += tl.trans(tl.sum(products, 2)).to(tl.float64)
    return total


@triton.jit
def _codes(rows_ptr, row, stride_row, steps_ptr, place, size, D: tl.constexpr, PLANES: tl.constexpr):
    """The codes' values at D places from `place` on, all of one step -> [R, D] float32; past the row's `size`
    bytes any."""
    step = place // 64
    byte = tl.load(steps_ptr + 2 * step) + place % 64 + tl.arange(0, D)
    bit = tl.load(steps_ptr + 2 * step + 1)
    at = rows_ptr + row[:, None] * stride_row + byte[None, :]
    code = tl.load(at, mask=(byte < size)[None, :], other=0).to(tl.int32)
    if PLANES == 8:
        return ((code >> bit) & 1).to(tl.float32) * 2.0 - 1.0
    elif PLANES == 2:
        return ((code >> bit) & 15).to(tl.float32) - 7.5
    else:
        return code.to(tl.float32)


@triton.jit
def _step_products(
    rows_ptr, row, stride_row, size, steps_ptr, queries_ptr, first_query, begin, end, places, padded,
    R: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, PLANES: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """<row, query> over the steps of places [begin, end) of packed rows -> [R, Q] float64; queries are as in
    _float_products, of `places` numbers, zero where a step's block has none."""
    query = first_query + tl.arange(0, Q)
    column = tl.arange(0, D)
    total = tl.zeros([R, Q], tl.float64)
    for flush in range(begin, end, FLUSH):
        stop = tl.minimum(flush + FLUSH, end)
        if TERMS == 0:
            products = tl.zeros([Q, R, D], tl.float32)
        else:
            sums = tl.zeros([R, Q], tl.float32)
        for d in range(flush, stop, D):
            x = _codes(rows_ptr, row, stride_row, steps_ptr, d, size, D, PLANES)
            if TERMS == 0:
                at = queries_ptr + query[:, None] * places + (d + column)[None, :]
                y = tl.load(at, mask=(query < padded)[:, None], other=0.0)
                products += x[None, :, :] * y[:, None, :]
            else:
                for term in tl.static_range(TERMS):
                    of_term = (term * padded + query)[None, :].to(tl.int64) * places
                    y = tl.load(queries_ptr + of_term + (d + column)[:, None])
                    sums = tl.dot(x.to(tl.float16), y, sums)
        if TERMS == 0:
            total += tl.trans(tl.sum(products, 2)).to(tl.float64)
        else:
            total += sums.to(tl.float64)
    return total


@triton.jit
def _exact_step_products(
    rows_ptr, row, stride_row, size, steps_ptr, exact_ptr, stride_exact, q, begin, end,
    R: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """The same of one query as it came, [R] float64."""
    total = tl.zeros([R], tl.float64)
    for d in range(begin, end, D):
        x = _codes(rows_ptr, row, stride_row, steps_ptr, d, size, D, PLANES).to(tl.float64)
        at = exact_ptr + q.to(tl.int64) * stride_exact + d + tl.arange(0, D)
        y = tl.load(at).to(tl.float64)
        total += tl.sum(x * y[None, :], 1)
    return total


@triton.jit
def _exact_products(
    rows_ptr, row, stride_row, exact_ptr, stride_exact, q, begin, end, R: tl.constexpr, D: tl.constexpr
):
    """One query's products as the reference has them, [R] float64."""
    total = tl.zeros([R], tl.float64)
    for d in range(begin, end, D):
        column = d + tl.arange(0, D)
        x = _load_rows(rows_ptr, row, stride_row, column, end).to(tl.float64)
        at = exact_ptr + q.to(tl.int64) * stride_exact + column
        y = tl.load(at, mask=column < end, other=0.0).to(tl.float64)
        # Where x has no number, Inf in y must not make one.
        total += tl.sum(tl.where((column < end)[None, :], x * y[None, :], 0.0), 1)
    return total


@triton.jit
def _topk_scan_kernel(
    rows_ptr, stride_row, n, width, first,
    queries_ptr, places, padded, units_ptr, sums_ptr, exact_ptr, stride_exact, q,
    scale_ptr, stride_scale, segments_ptr, segment_count, steps_ptr, scales_ptr, stride_scales, valid_ptr,
    base_ptr, stride_base, partial_ptr, stride_partial, kept_ptr, counts_ptr, least_ptr, after_ptr, k,
    R: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, PLANES: tl.constexpr, TERMS: tl.constexpr,
    STEPS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ENDS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """PLANES: 0 for floats, whose queries have TERMS terms; STEPS: packed rows with blocks, whose queries are
    floats too, of `places` numbers. ENDS: 1 the largest, 2 the smallest, 3 both."""
    LISTS: tl.constexpr = 2 if ENDS == 3 else 1
    first_query = tl.program_id(0) * Q
    number = tl.arange(0, Q)
    query = first_query + number
    real = query < q
    # this program's lists, and what all programs share: of one query after another
    list_number = (tl.program_id(1).to(tl.int64) * q + first_query) * LISTS
    lists_ptr = kept_ptr + list_number * CAPACITY
    shared_ptr = least_ptr + first_query * LISTS
    none = tl.full([Q], 0x7FFFFFFFFFFFFFFF, tl.int64)  # which no key beats
    counts_a = tl.load(counts_ptr + list_number + number * LISTS, mask=real, other=0)
    least_a = tl.load(shared_ptr + number * LISTS, mask=real, other=0)
    least_a = tl.where(real, least_a, none)
    counts_b = tl.load(counts_ptr + list_number + number * LISTS + LISTS - 1, mask=real, other=0)
    least_b = tl.load(shared_ptr + number * LISTS + LISTS - 1, mask=real, other=0)
    least_b = tl.where(real, least_b, none)
    if LAST:
        counts_a, least_a = _cut(
            counts_a, least_a, lists_ptr, LISTS * CAPACITY, shared_ptr, CAPACITY - R, k,
            CAPACITY=CAPACITY, Q=Q,
        )  # fmt: skip
        if ENDS == 3:
            counts_b, least_b = _cut(
                counts_b, least_b, lists_ptr + CAPACITY, LISTS * CAPACITY, shared_ptr + 1, CAPACITY - R, k,
                CAPACITY=CAPACITY, Q=Q,
            )  # fmt: skip
    unit = tl.load(units_ptr + query, mask=real, other=0.0)

    # A cache may have 2^31 - 1 rows, and the last tile reach beyond what 32 bits hold.
    tiles = tl.cdiv(tl.full((), 0, tl.int64) + n, R)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        at = tile * R + tl.arange(0, R)
        there = at < n
        row = tl.minimum(at, n - 1)
        if scale_ptr is None:
            scale = tl.full([R], 1.0, tl.float64)
        else:
            scale = tl.load(scale_ptr + row * stride_scale).to(tl.float64)
        if PLANES == 0 or STEPS:
            total = tl.zeros([R, Q], tl.float64)
            if segments_ptr is None:
                total += _float_products(
                    rows_ptr, row, stride_row, queries_ptr, first_query, 0, width, width, padded,
                    R, D, Q, TERMS,
                )  # fmt: skip
            else:
                for s in range(segment_count):
                    begin = tl.load(segments_ptr + 3 * s)
                    end = tl.load(segments_ptr + 3 * s + 1)
                    column = tl.load(segments_ptr + 3 * s + 2)
                    if STEPS:
                        piece = _step_products(
                            rows_ptr, row, stride_row, width, steps_ptr, queries_ptr, first_query, begin, end,
                            places, padded, R, D, Q, PLANES, TERMS,
                        )  # fmt: skip
                    else:
                        piece = _float_products(
                            rows_ptr, row, stride_row, queries_ptr, first_query, begin, end, width, padded,
                            R, D, Q, TERMS,
                        )  # fmt: skip
                    of_block = tl.load(scales_ptr + row * stride_scales + column).to(tl.float64)
                    total += of_block[:, None] * piece
            total *= unit[None, :]
            # High and low parts are of no use with Inf, and float32 may not hold a sum that the score can
            broken = (~(tl.abs(total) <= 1e300) & there[:, None] & real[None, :]).to(tl.int32)
            if tl.max(broken) > 0:
                for j in range(tl.minimum(Q, q - first_query)):
                    exact = tl.zeros([R], tl.float64)
                    if segments_ptr is None:
                        exact += _exact_products(
                            rows_ptr, row, stride_row, exact_ptr, stride_exact, first_query + j, 0, width,
                            R, D,
                        )  # fmt: skip
                    else:
                        for s in range(segment_count):
                            begin = tl.load(segments_ptr + 3 * s)
                            end = tl.load(segments_ptr + 3 * s + 1)
                            column = tl.load(segments_ptr + 3 * s + 2)
                            of_block = tl.load(scales_ptr + row * stride_scales + column).to(tl.float64)
                            if STEPS:
                                part = _exact_step_products(
                                    rows_ptr, row, stride_row, width, steps_ptr, exact_ptr, stride_exact,
                                    first_query + j, begin, end, R, D, PLANES,
                                )  # fmt: skip
                            else:
                                part = _exact_products(
                                    rows_ptr, row, stride_row, exact_ptr, stride_exact, first_query + j,
                                    begin, end, R, D,
                                )  # fmt: skip
                            exact += of_block * part
                    total = tl.where((number == j)[None, :] & (broken != 0), exact[:, None], total)
            total *= scale[:, None]
        else:
            total = _integer_products(
                rows_ptr, row, stride_row, queries_ptr, first_query, width, padded, R, D, Q, PLANES,
                TERMS > 0,
            )  # fmt: skip
            of_query = tl.load(sums_ptr + query, mask=real, other=0).to(tl.float64)
            # as in csrc/cpu/packed.h: a bit is 2 b - 1, a nibble n - 7.5
            if PLANES == 8:
                total = 2.0 * total - of_query[None, :]
            elif PLANES == 2:
                total = 2.0 * total - 15.0 * of_query[None, :]
                scale *= 0.5
            total = scale[:, None] * (unit[None, :] * total)
        inside = there[:, None] & real[None, :]
        partial_at = partial_ptr + query[None, :].to(tl.int64) * stride_partial + row[:, None]
        if not FIRST:
            total += tl.load(partial_at, mask=inside, other=0.0)
        if not LAST:
            tl.store(partial_at, total, mask=inside)
        else:
            wanted = there
            if valid_ptr is not None:
                wanted &= tl.load(valid_ptr + row) != 0
            if base_ptr is not None:
                base_at = base_ptr + query[None, :].to(tl.int64) * stride_base + row[:, None]
                total += tl.load(base_at, mask=inside, other=0.0).to(tl.float64)
            score = total.to(tl.float32)
            keys = tl.where(wanted[:, None], _keys(score, at + first, SMALLEST=ENDS == 2), 0)
            if after_ptr is not None:
                after = tl.load(after_ptr + query * LISTS, mask=real, other=0)
                keys = tl.where(keys < after[None, :], keys, 0)
            counts_a, least_a = _keep(
                keys, counts_a, least_a, lists_ptr, LISTS * CAPACITY, shared_ptr, k,
                CAPACITY=CAPACITY, R=R, Q=Q,
            )  # fmt: skip
            if ENDS == 3:
                keys = tl.where(wanted[:, None], _keys(score, at + first, SMALLEST=True), 0)
                if after_ptr is not None:
                    after = tl.load(after_ptr + query * LISTS + 1, mask=real, other=0)
                    keys = tl.where(keys < after[None, :], keys, 0)
                counts_b, least_b = _keep(
                    keys, counts_b, least_b, lists_ptr + CAPACITY, LISTS * CAPACITY, shared_ptr + 1, k,
                    CAPACITY=CAPACITY, R=R, Q=Q,
                )  # fmt: skip
    if LAST:
        tl.store(counts_ptr + list_number + number * LISTS, counts_a, mask=real)
        if ENDS == 3:
            tl.store(counts_ptr + list_number + number * LISTS + 1, counts_b, mask=real)


@triton.jit
def _topk_merge_kernel(
    kept_ptr, counts_ptr, least_ptr, merged_ptr, last_ptr, programs, q, k,
    scores_ptr, indices_ptr, stride_out,
    ENDS: tl.constexpr, END: tl.constexpr, CAPACITY: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One query's list of one end: the best k of all programs, in order. P: programs, rounded up."""
    LISTS: tl.constexpr = 2 if ENDS == 3 else 1
    of_query = tl.program_id(0)
    number = of_query * LISTS + END
    program = tl.arange(0, P)
    count = tl.load(counts_ptr + program * (q * LISTS) + number, mask=program < programs, other=0)
    slots = tl.max(count) * programs
    merged = merged_ptr + number.to(tl.int64) * (2 * R)
    counts = tl.zeros([1], tl.int32)
    # that key itself is one of the k
    least = tl.maximum(tl.load(least_ptr + number + tl.arange(0, 1)) - 1, 0)
    for begin in range(0, slots, R):
        slot = begin + tl.arange(0, R)
        at = slot // programs
        of = (slot % programs) * (q * LISTS) + number
        there = (slot < slots) & (at < tl.load(counts_ptr + of, mask=slot < slots, other=0))
        keys = tl.load(kept_ptr + of.to(tl.int64) * CAPACITY + at, mask=there, other=0)
        counts, least = _keep(
            keys[:, None], counts, least, merged, 0, last_ptr + number, k, CAPACITY=2 * R, R=R, Q=1
        )
    tl.debug_barrier()
    place = tl.arange(0, 2 * R)
    found = tl.sum(counts)
    keys = _sorted(tl.load(merged + place, mask=place < found, other=0), 2 * R)
    ascending = keys >> 31
    if ENDS == 2 or END == 1:
        ascending = ascending ^ 0xFFFFFFFF
    bits = tl.where(ascending >= 0x80000000, ascending - 0x80000000, ascending ^ 0xFFFFFFFF)
    signed = tl.where(bits >= 0x80000000, bits - 0x100000000, bits).to(tl.int32)
    score = tl.where(place < found, signed.to(tl.float32, bitcast=True), float("nan"))
    index = tl.where(place < found, 0x7FFFFFFF - (keys & 0x7FFFFFFF), -1)
    out = of_query.to(tl.int64) * stride_out + place
    tl.store(scores_ptr + out, score, mask=place < k)
    tl.store(indices_ptr + out, index, mask=place < k)
    # with too few, 1: no key is as bad
    last = tl.sum(tl.where(place == k - 1, keys, 0))
    tl.debug_barrier()
    tl.store(last_ptr + number, tl.where(found >= k, last, 1))


def tile_of(dtype: torch.dtype, planes: int, q: int) -> dict[str, int]:
    """How many rows, columns and queries a program takes at a time, and its warps and stages."""
    if q <= FEW:
        few = triton.next_power_of_2(q)
        columns = 512 // dtype.itemsize if planes == 0 else 128 if planes == 2 else 256
        rows = 16 if few == 1 else 8
        return {"R": rows, "D": max(columns // few, 32), "Q": few, "num_warps": 4, "num_stages": 3}
    columns = 16 if dtype == torch.float32 else 128 if planes == 1 else 32
    return {"R": 64, "D": columns, "Q": 16, "num_warps": 8, "num_stages": 3}


def topk_scan(
    rows: Tensor,
    width: int,
    queries: Tensor,
    units: Tensor,
    sums: Tensor | None,
    exact: Tensor,
    *,
    planes: int,
    terms: int,
    tile: dict[str, int],
    first: int,
    scale: Tensor | None,
    segments: Tensor | None,
    steps: Tensor | None,
    scales: Tensor | None,
    valid: Tensor | None,
    base: Tensor | None,
    partial: Tensor | None,
    first_part: bool,
    last_part: bool,
    keys: Tensor,
    counts: Tensor,
    least: Tensor,
    after: Tensor | None,
    k: int,
    ends: int,
) -> None:
    """Add one part's products with rows [first, first + N) to `partial`, or with the last part keep the best.

    rows: [N, width] floats (planes 0), or packed bytes with as many planes a byte
    queries: [max(terms, 1) or planes, padded Q, width], see _float_products and _integer_products; units: [Q]
        float64, what 1 of them stands for; sums: [Q] int64 of integers; exact: [Q, numbers] float32 as they
        came
    steps: [steps, 2] int32 of packed rows with blocks: a group's first byte, a plane's first bit; queries and
        exact then have 64 places a step, and segments are of places
    keys: [programs, Q, ends, capacity] int64, counts: [programs, Q, ends] int32, least: [Q, ends] int64
    """
    n, q = len(rows), len(exact)
    grid = (triton.cdiv(q, tile["Q"]), keys.shape[0])
    _topk_scan_kernel[grid](
        rows, rows.stride(0), n, width, first,
        queries, queries.shape[-1], queries.shape[-2], units, sums, exact, exact.stride(0), q,
        scale, 0 if scale is None else scale.stride(0),
        segments, 0 if segments is None else len(segments), steps,
        scales, 0 if scales is None else scales.stride(0),
        valid, base, 0 if base is None else base.stride(0),
        partial if partial is not None else keys, 0 if partial is None else partial.stride(0),
        keys, counts, least, after, k,
        **tile, PLANES=planes, TERMS=terms, STEPS=steps is not None, FIRST=first_part, LAST=last_part,
        ENDS=ends, CAPACITY=keys.shape[3],
        # Of packed rows the bits are the CPU's: a product is rounded before anything is added to it.
        enable_fp_fusion=planes == 0 or steps is not None,
    )  # fmt: skip


def topk_merge(
    keys: Tensor,
    counts: Tensor,
    least: Tensor,
    last: Tensor,
    k: int,
    ends: int,
    outs: list[tuple[Tensor, Tensor]],
) -> None:
    """The best k <= 1,024 of what all programs kept, in order, to (scores, indices) [Q, k] of each end; the
    last keys to last [Q, ends]."""
    programs, q, lists, capacity = keys.shape
    merged = torch.empty(q, lists, 2 * MERGED, dtype=torch.int64, device=keys.device)
    last.zero_()
    for end, (scores, indices) in enumerate(outs):
        options: dict[str, Any] = {"ENDS": ends, "END": end, "CAPACITY": capacity, "R": MERGED}
        _topk_merge_kernel[(q,)](
            keys, counts, least, merged, last, programs, q, k, scores, indices, scores.stride(0),
            **options, P=triton.next_power_of_2(programs), num_warps=8,
        )  # fmt: skip
