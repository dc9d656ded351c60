"""The ops on the C++ kernels of rapidin.ops._cpu. Arguments have been checked; each function is one op."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rapidin.ops import _cpu, tables
from rapidin.ops.low_rank import LowRank, applied, coefficients
from rapidin.ops.packed import Packed, PackedDtype, packed_bytes
from rapidin.ops.rotate import ROTATION, Cut
from rapidin.ops.tables import CPU

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PACKED_DTYPES = {"int8": 3, "int4": 4, "sign": 5}

# Costs in nanoseconds on one thread, from bench/bench_linear_sketch.py: only their ratios count.
_COUNT_SKETCH_NS = 0.45  # an element put in its bin
_PRODUCT_NS = 0.022  # a multiply-add of a batched matrix product
_FUSED_SKETCH_NS = 0.1  # the same by the fused kernel, and its transform of a token:
_FUSED_PAIR_NS, _FUSED_FFT_NS = 0.35, 0.035  # times k, times k log2(k)
_FUSED_PRODUCT_NS = 0.018  # a multiply-add of a LowRank in it
_PAIR_NS, _FFT_NS = 2.0, 0.15  # the same with torch's FFT
_FOLD_NS = 0.1  # an element added to its diagonal

_FUSED_TOKENS = 16  # that the fused kernel takes at a time
# Bytes of a thread's tokens that torch's FFT transforms at a time: they and their spectra fit its L2 cache
_FFT_BUFFER_BYTES = 1 << 18
_PRODUCT_BYTES = 64 << 20  # matrices held at a time


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    scales: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    batch = len(tensors[0])
    lengths = _square_lengths(tensors) if squares else None
    if scales is not None:
        tensors = [x.float() * scale for x, scale in zip(tensors, scales, strict=True)]
    out = torch.empty(batch, dim, device=CPU)
    width = min(dim, 128)
    flat = [x.reshape(batch, x[:1].numel()) for x in tensors if x.numel()]
    flat = [x if x.stride(1) == 1 else x.contiguous() for x in flat]
    listed, row = [], 0
    for x in flat:
        listed.append((x.data_ptr(), _DTYPES[x.dtype], x.shape[1], x.stride(0), row))
        row += -(-x.shape[1] // width)
    _cpu.flat_sketch(listed, batch, seed, dim, out.data_ptr(), torch.get_num_threads())
    return out, lengths


def _square_lengths(tensors: Sequence[Tensor]) -> Tensor:
    """tensors: [B, ...] each -> [B, n]"""
    return torch.stack(
        [x.float().square().flatten(1).sum(1) if x.ndim > 1 else x.float().square() for x in tensors], 1
    )


def matrix_sketch(grad: Tensor, dim: int, *, seed: int) -> Tensor:
    *leading, n_out, n_in = grad.shape
    matrices = grad.reshape(-1, n_out, n_in)
    row_table = tables.rows(seed, tables.OUT, n_out, dim)
    return _fold(matrices, row_table, tables.columns(seed, tables.IN, n_in, dim), dim).reshape(*leading, dim)


def embedding_sketch(ids: Tensor, grads: Tensor, dim: int, *, seed: int, vocabulary: int) -> Tensor:
    rows = 1 << (vocabulary - 1).bit_length()  # rounded up, so that few tables serve all batches
    row_table = tables.rows(seed, tables.OUT, rows, dim)[ids]
    return _fold(grads, row_table, tables.columns(seed, tables.IN, grads.shape[-1], dim), dim)


def linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    low_ranks = inputs_low_rank, grads_low_rank
    ranks = tuple(0 if each is None else each.rank for each in low_ranks)
    way = choose_way(inputs.shape[1], inputs.shape[2], grads.shape[2], dim, *ranks)
    if way is None:
        return by_fft(inputs, grads, dim, seed, *low_ranks)
    return by_product(inputs, grads, dim, seed, *way, *low_ranks)


def choose_way(
    tokens: int, n_in: int, n_out: int, k: int, rank_in: int = 0, rank_out: int = 0
) -> tuple[bool, bool] | None:
    """The cheapest way for one example: None = FFT, else which of (inputs, grads) to count-sketch first.

    rank_in, rank_out: of their LowRank, 0 where there is none.
    """
    # Multiply-adds of a LowRank: for a row of features alone, and for one that is also sketched.
    alone_in, alone_out = _multiply_adds(n_in, rank_in), _multiply_adds(n_out, rank_out)
    table_in, table_out = rank_in * (n_in + min(k, n_in)), rank_out * (n_out + min(k, n_out))
    best: tuple[bool, bool] | None = None
    if _cpu.has_tensor_sketch(k):
        whole = -(-tokens // _FUSED_TOKENS) * _FUSED_TOKENS
        fft = k * (_FUSED_PAIR_NS + _FUSED_FFT_NS * k.bit_length())
        products = _FUSED_PRODUCT_NS * (table_in + table_out)
        best_cost = whole * (_FUSED_SKETCH_NS * (n_in + n_out) + products + fft)
    else:
        fft = k * (_PAIR_NS + _FFT_NS * k.bit_length())
        best_cost = tokens * (_COUNT_SKETCH_NS * (n_in + n_out) + _PRODUCT_NS * (alone_in + alone_out) + fft)
    for sketch_in in (False, True):
        for sketch_out in (False, True):
            cols, rows = k if sketch_in else n_in, k if sketch_out else n_out
            if rows * cols > max(k * k, 1 << 16):
                continue  # not to form such a matrix is what sketching is for
            cost = tokens * (
                _COUNT_SKETCH_NS * (sketch_in * n_in + sketch_out * n_out) + _PRODUCT_NS * rows * cols
            )
            # Where a side is not sketched its LowRank is applied to the tokens or to the matrix.
            product_in = tokens * table_in if sketch_in else min(tokens, rows) * alone_in
            product_out = tokens * table_out if sketch_out else min(tokens, cols) * alone_out
            cost += _PRODUCT_NS * (product_in + product_out)
            if sketch_in or sketch_out:
                cost += _FOLD_NS * rows * cols
            else:
                cost += min(rows, cols) * (_COUNT_SKETCH_NS * max(rows, cols) + _FOLD_NS * k)
            if cost < best_cost:
                best, best_cost = (sketch_in, sketch_out), cost
    return best


def _multiply_adds(n: int, rank: int) -> int:
    """Multiply-adds of a LowRank applied to n features: as the whole matrix where that is less."""
    return min(2 * n * rank, n * n)


def by_fft(
    inputs: Tensor,
    grads: Tensor,
    k: int,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    """TensorSketch by one complex FFT a token: the sum of FFT(cs(a) + i cs(g))^2 holds the spectrum."""
    if not _cpu.has_tensor_sketch(k):
        return by_torch_fft(inputs, grads, k, seed, inputs_low_rank, grads_low_rank)
    if inputs_low_rank is not None and inputs_low_rank.matrix is not None:
        inputs, inputs_low_rank = inputs_low_rank(inputs), None
    if grads_low_rank is not None and grads_low_rank.matrix is not None:
        grads, grads_low_rank = grads_low_rank(grads), None
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    table_in, table_out = tables.rows(seed, tables.IN, n_in, k), tables.rows(seed, tables.OUT, n_out, k)
    low_rank_in = _low_rank(inputs_low_rank, seed, tables.IN, k)
    low_rank_out = _low_rank(grads_low_rank, seed, tables.OUT, k)
    out = torch.empty(batch, k, device=CPU)
    _cpu.tensor_sketch(
        inputs.data_ptr(), _DTYPES[inputs.dtype], n_in, inputs.stride(), table_in.data_ptr(), low_rank_in,
        grads.data_ptr(), _DTYPES[grads.dtype], n_out, grads.stride(), table_out.data_ptr(), low_rank_out,
        batch, tokens, k, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _low_rank(
    low_rank: LowRank | None, seed: int, side: tuple[int, int], k: int
) -> tuple[int, int, int, int]:
    """A LowRank as the fused kernel takes it. The table is for sides with more features than bins."""
    if low_rank is None:
        return 0, 0, 0, 0
    table = low_rank.table(seed, side, k).data_ptr() if low_rank.features > k else 0
    return low_rank.basis.data_ptr(), low_rank.gain.data_ptr(), table, low_rank.rank


def by_torch_fft(
    inputs: Tensor,
    grads: Tensor,
    k: int,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    """The same with torch's FFT, for widths that are no power of two."""
    inputs, grads = applied(inputs, inputs_low_rank), applied(grads, grads_low_rank)
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    threads = torch.get_num_threads()
    table_in = tables.columns(seed, tables.IN, n_in, k)
    table_out = tables.columns(seed, tables.OUT, n_out, k)
    step = max(16, min(batch * tokens, threads * _FFT_BUFFER_BYTES // (8 * k)))
    sketches, spectra = torch.empty(2, step, k, dtype=torch.complex64, device=CPU)
    total = torch.zeros(batch, k, dtype=torch.complex64, device=CPU)
    for first in range(0, batch * tokens, step):
        count = min(step, batch * tokens - first)
        z = sketches[:count]
        _cpu.count_sketch_pairs(
            inputs.data_ptr(), _DTYPES[inputs.dtype], n_in, inputs.stride(), table_in.data_ptr(),
            grads.data_ptr(), _DTYPES[grads.dtype], n_out, grads.stride(), table_out.data_ptr(),
            tokens, first, count, k, z.data_ptr(), threads,
        )  # fmt: skip
        spectrum = torch.fft.fft(z, out=spectra[:count])
        _cpu.square_sums(spectrum.data_ptr(), first, count, tokens, k, total.data_ptr(), threads)
    # total = A^2 - G^2 + 2i A G with A and G of real rows: X[-w] = conj(X[w]) takes the first two away
    mirrored = total.flip(1).roll(1, 1).conj()
    product: Tensor = torch.fft.ifft((total - mirrored) / 4j).real.contiguous()
    return product


def by_product(
    inputs: Tensor,
    grads: Tensor,
    k: int,
    seed: int,
    sketch_in: bool,
    sketch_out: bool,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    """TensorSketch by one matrix an example, grads^T inputs, with long sides sketched to k first."""
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    # The LowRank of a side that is not sketched is applied to the matrix, where that has fewer rows.
    if inputs_low_rank is not None and not sketch_in and (k if sketch_out else n_out) >= tokens:
        inputs, inputs_low_rank = inputs_low_rank(inputs), None
    if grads_low_rank is not None and not sketch_out and (k if sketch_in else n_in) >= tokens:
        grads, grads_low_rank = grads_low_rank(grads), None
    a = _count_sketch(inputs, seed, tables.IN, k, inputs_low_rank) if sketch_in else inputs.float()
    g = _count_sketch(grads, seed, tables.OUT, k, grads_low_rank) if sketch_out else grads.float()
    of_columns, of_rows = None if sketch_in else inputs_low_rank, None if sketch_out else grads_low_rank
    # Columns are what the fold adds as whole rows: a sketched side where there is one, else the longer.
    a_in_columns = sketch_in or (not sketch_out and n_in >= n_out)
    rows, cols = (g, a) if a_in_columns else (a, g)
    of_rows, of_columns = (of_rows, of_columns) if a_in_columns else (of_columns, of_rows)
    row_side, col_side = (tables.OUT, tables.IN) if a_in_columns else (tables.IN, tables.OUT)
    row_table = None if sketch_in and sketch_out else tables.rows(seed, row_side, rows.shape[2], k)
    col_table = None if sketch_in or sketch_out else tables.columns(seed, col_side, cols.shape[2], k)
    out = torch.empty(batch, k, device=CPU)
    step = max(1, _PRODUCT_BYTES // (4 * rows.shape[2] * cols.shape[2]))
    for b in range(0, batch, step):
        matrices = torch.bmm(rows[b : b + step].transpose(1, 2), cols[b : b + step])
        matrices = applied(applied(matrices, of_columns).mT, of_rows).mT
        out[b : b + step] = _fold(matrices, row_table, col_table, k)
    return out


def _count_sketch(x: Tensor, seed: int, side: tuple[int, int], k: int, low_rank: LowRank | None) -> Tensor:
    """[B, T, n] -> [B, T, k] float32"""
    batch, tokens, n = x.shape
    table = tables.columns(seed, side, n, k)
    out = torch.empty(batch, tokens, k, device=CPU)
    _cpu.count_sketch(
        x.data_ptr(), _DTYPES[x.dtype], batch, tokens, n, x.stride(), table.data_ptr(), k,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if low_rank is not None:
        of_basis = low_rank.table(seed, side, k)
        out.view(-1, k).addmm_(coefficients(x, low_rank).flatten(0, 1), of_basis.T)
    return out


def _fold(matrices: Tensor, row_table: Tensor | None, col_table: Tensor | None, k: int) -> Tensor:
    """matrices: [B, R, C]; row_table: [R] or [B, R] (None: row r has bin r); col_table likewise -> [B, k]."""
    batch, rows, cols = matrices.shape
    out = torch.empty(batch, k, device=CPU)
    _cpu.fold(
        matrices.data_ptr(), _DTYPES[matrices.dtype], batch, rows, cols, matrices.stride(),
        0 if row_table is None else row_table.data_ptr(),
        rows if row_table is not None and row_table.ndim == 2 else 0,
        0 if col_table is None else col_table.data_ptr(),
        k, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def pack(x: Tensor, dtype: PackedDtype) -> tuple[Tensor, Tensor]:
    n, width = x.shape
    if x.stride(1) != 1 and width > 1:
        x = x.contiguous()
    code_dtype = torch.int8 if dtype == "int8" else torch.uint8
    codes = torch.empty(n, packed_bytes(width, dtype), dtype=code_dtype, device=CPU)
    scale = torch.empty(n, device=CPU)
    _cpu.pack(
        x.data_ptr(), _DTYPES[x.dtype], n, width, x.stride(0), _PACKED_DTYPES[dtype],
        codes.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale


def unpack(packed: Packed) -> Tensor:
    arguments, rows = _row_arguments(packed)
    x = torch.empty(len(rows), packed.width, device=CPU)
    _cpu.unpack(arguments, len(x), x.data_ptr(), torch.get_num_threads())
    return x


def rotate(x: Tensor, *, seed: int, inverse: bool, mean: Tensor | None, cut: Cut | None) -> Tensor:
    if mean is not None:
        x = x - mean
    words = torch.empty(x.shape[1] * x.shape[2], dtype=torch.int32, device=CPU)
    _cpu.hash_words(seed, ROTATION, 0, len(words), words.data_ptr())
    signs = torch.where(words < 0, -1.0, 1.0).view(x.shape[1:])
    # Codes are made of rotated sketches, and caches of all versions must have the same: those keep the order
    # of their sums. Decoded rows go through the inverse alone.
    x = _hadamard_by_products(x) * signs if inverse else _hadamard(x * signs)
    return x if cut is None else cut.of(x)


def _hadamard(x: Tensor) -> Tensor:
    """The normalized Hadamard transform of the last axis: its own inverse."""
    shape, width = x.shape, x.shape[-1]
    x = x.reshape(-1, width) / math.sqrt(width)
    half = 1
    while half < width:
        pairs = x.view(len(x), -1, 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(-1, width)
        half *= 2
    return x.view(shape)


def _hadamard_by_products(x: Tensor) -> Tensor:
    """The same to rounding, in a third of the time: a block as a matrix [rows, columns] is multiplied by a
    smaller Hadamard matrix from either side, in two passes over the memory instead of one for each power of
    two."""
    shape, width = x.shape, x.shape[-1]
    rows = 1 << (width.bit_length() - 1) // 2
    blocks = (x / math.sqrt(width)).reshape(-1, rows, width // rows)
    return (_signs(rows) @ (blocks @ _signs(width // rows))).view(shape)


@cache
def _signs(width: int) -> Tensor:
    """The Hadamard matrix [width, width] of 1 and -1."""
    made = torch.ones(1, 1, device=CPU)
    while len(made) < width:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def unit_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    # In float64, for the squares of small gradients leave float32's range; but no copy of the sketch in it.
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    unit = x / torch.where(length > 0, length, 1.0).to(x.dtype)[..., None]
    return unit.float(), length.float()


def topk_scan(
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    *,
    largest: bool,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    made: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    top, bottom = _scan(cache, queries, k, largest, not largest, scales, offsets, valid, base, None)
    return top if largest else bottom


def topk_scan_both_ends(
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    *,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    scores: Tensor | None = None,
    made: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, bottom = _scan(cache, queries, k, True, True, scales, offsets, valid, base, scores)
    return (*top, *bottom)


def _scan(
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    want_top: bool,
    want_bottom: bool,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    scores: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    parts = [_row_arguments(rows) for rows in cache]
    n = len(parts[0][1])
    k = min(k, n)
    queries = queries.contiguous()
    if scales is not None and scales.stride(1) != 1:
        scales = scales.contiguous()
    if base is not None and base.stride(1) != 1:
        base = base.contiguous()
    valid = valid.contiguous() if valid is not None else None
    top, bottom = _empty_ranking(len(queries), k, want_top), _empty_ranking(len(queries), k, want_bottom)
    _cpu.topk_scan(
        [arguments for arguments, _ in parts], n, queries.shape[1],
        queries.data_ptr(), len(queries),
        list(offsets) if offsets is not None else [],
        scales.data_ptr() if scales is not None else 0,
        scales.stride(0) if scales is not None else 0,
        valid.data_ptr() if valid is not None else 0,
        base.data_ptr() if base is not None else 0,
        base.stride(0) if base is not None else 0,
        k,
        top[0].data_ptr() if want_top else 0,
        top[1].data_ptr() if want_top else 0,
        bottom[0].data_ptr() if want_bottom else 0,
        bottom[1].data_ptr() if want_bottom else 0,
        scores.data_ptr() if scores is not None else 0,
        len(scores) if scores is not None else 0,
        scores.stride(0) if scores is not None else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return top, bottom


def _row_arguments(rows: Tensor | Packed) -> tuple[tuple[int, int, int, int, int, int, int], Tensor]:
    """What the kernels take for one part of the rows, and its tensor, which must outlive the call."""
    x = rows if isinstance(rows, Tensor) else rows.codes
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    if x.dtype == torch.bfloat16:
        raise TypeError(
            "topk_scan: backend 'cpu' takes float32 and float16, got bfloat16; "
            "convert the cache with .float(), or ask for backend='reference'"
        )
    if isinstance(rows, Tensor):
        return (x.data_ptr(), _DTYPES[x.dtype], x.shape[1], x.stride(0), 0, 0, 0), x
    scale = rows.scale
    scales = (0, 0, 0) if scale is None else (scale.data_ptr(), _DTYPES[scale.dtype], scale.stride(0))
    return (x.data_ptr(), _PACKED_DTYPES[rows.dtype], rows.width, x.stride(0), *scales), x


def _empty_ranking(queries: int, k: int, filled: bool) -> tuple[Tensor, Tensor]:
    size = (queries, k) if filled else (0, 0)
    return torch.empty(size, device=CPU), torch.empty(size, dtype=torch.int64, device=CPU)
