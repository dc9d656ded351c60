"""topk_scan and topk_scan_both_ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.ops import gpu_scan
from rapidin.ops.cuda.extension import DTYPES, PACKED_DTYPES, extension, place
from rapidin.ops.gpu_scan import (
    Kept,
    Part,
    Segment,
    Step,
    float_terms,
    integer_planes,
    integer_queries,
    scaled_queries,
)
from rapidin.ops.lifetimes import kept

_FORMATS = {"float32": 0, "float16": 1, "bfloat16": 2, **PACKED_DTYPES}
_UNIT = 64  # bytes of a row that a warp takes at a time
_SCAN_ROWS = 256  # that a block takes at a time
_COLUMNS = 8  # of the tensor cores' second operand
# Tiles of columns that a block holds where there are more queries than fill one
_TILES = {"float32": 2, "float16": 4, "bfloat16": 4, "int8": 4, "int4": 2, "sign": 1}
_BLOCKS_A_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class _Prepared:
    """Queries as csrc/cuda/topk_scan.cuh takes them."""

    fragments: Tensor  # [query tiles, units, planes, tiles, columns held, 4, 16 bytes]
    units: int
    tiles: int
    columns_held: int
    query_tiles: int
    segments: Tensor | None
    segment_count: int
    queries: Tensor
    units_of: Tensor  # [Q] float64
    sums: Tensor | None  # [Q] int64


class _Kernels:
    """gpu_scan.Kernels by the extension."""

    def prepare(self, part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> _Prepared:
        return prepare(part, queries, segments)

    def unpack(self, part: Part, out: Tensor) -> None:
        rows = part.rows
        extension().unpack_codes(
            rows.data_ptr(), _FORMATS[part.dtype], len(rows), part.width, rows.stride(0), out.data_ptr(),
            place(rows),
        )  # fmt: skip

    def keep(self, prepared: _Prepared, q: int, k: int, ends: int, rows: int, device: torch.device) -> Kept:
        running = _BLOCKS_A_MULTIPROCESSOR * extension().multiprocessors(place(prepared.queries)[0])
        blocks = max(1, min(-(-rows // _SCAN_ROWS), running // prepared.query_tiles))
        capacity = 1024 if k <= _SCAN_ROWS else 2048  # a multiple of k, and of what a tile of rows may add
        return Kept.none(blocks, q, k, ends, capacity, device)

    def scan(self, step: Step) -> None:
        part, prepared, kept, base = step.part, step.prepared, step.kept, step.base
        size = 1 if part.dtype in PACKED_DTYPES else part.rows.element_size()
        fields = {
            **_kept_fields(kept, len(prepared.queries)),
            "rows": part.rows.data_ptr(),
            "format": _FORMATS[part.dtype],
            "n": len(part.rows),
            "width": part.width,
            "stride_row": part.rows.stride(0) * size,
            "first": step.first,
            "scale": _address(part.scale),
            "scale_dtype": 0 if part.scale is None else DTYPES[part.scale.dtype],
            "stride_scale": 0 if part.scale is None else part.scale.stride(0),
            "segments": _address(prepared.segments),
            "segment_count": prepared.segment_count,
            "units": prepared.units,
            "scales": _address(step.scales),
            "stride_scales": 0 if step.scales is None else step.scales.stride(0),
            "fragments": prepared.fragments.data_ptr(),
            "tiles": prepared.tiles,
            "columns_held": prepared.columns_held,
            "queries": prepared.queries.data_ptr(),
            "stride_query": prepared.queries.stride(0),
            "units_of": prepared.units_of.data_ptr(),
            "sums": _address(prepared.sums),
            "partial": _address(step.partial),
            "stride_partial": 0 if step.partial is None else step.partial.stride(0),
            "first_part": step.first_part,
            "last_part": step.last_part,
            "valid": _address(step.valid),
            "base": _address(base),
            "stride_base": 0 if base is None else base.stride(0),
            "after": _address(step.after),
        }
        extension().topk_scan(fields, place(part.rows))

    def merge(self, kept: Kept, outs: Sequence[tuple[Tensor, Tensor]]) -> None:
        fields = _kept_fields(kept, kept.keys.shape[1])
        (scores, indices), (low_scores, low_indices) = outs[0], outs[-1]
        extension().topk_merge(
            fields, scores.data_ptr(), indices.data_ptr(), low_scores.data_ptr(), low_indices.data_ptr(),
            scores.stride(0), kept.last.data_ptr(), place(scores),
        )  # fmt: skip


def _kept_fields(kept: Kept, q: int) -> dict[str, int]:
    return {
        "q": q,
        "kept": kept.keys.data_ptr(),
        "counts": kept.counts.data_ptr(),
        "least": kept.least.data_ptr(),
        "k": kept.k,
        "capacity": kept.capacity,
        "row_blocks": kept.programs,
        "ends": kept.ends,
    }


def prepare(part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> _Prepared:
    """queries: [Q, width] float32 of one part, in the order in which lanes take them."""
    dtype, q = part.dtype, len(queries)
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    sums = None
    if dtype in PACKED_DTYPES:
        integers, units_of, sums = integer_queries(queries, dtype)
        columns = integer_planes(integers, dtype)
        columns = columns[:, :, None] if dtype == "int8" else columns[:, None]
    else:
        scaled, units_of = scaled_queries(queries)
        columns = _split(scaled, dtype)
    # columns: [Q, columns a query, planes, numbers]
    unit = _UNIT // columns.element_size()
    table = None
    count = 1
    if segments is None:
        units = -(-columns.shape[3] // unit)
        columns = torch.nn.functional.pad(columns, (0, units * unit - columns.shape[3]))
    else:
        places, table = _segment_tables(tuple(segments), part.width, unit, queries.device)
        count, units = len(segments), len(places) // unit
        columns = torch.nn.functional.pad(columns, (0, 1))[..., places]
    each = columns.shape[1]
    tiles = 1 if q * each <= _COLUMNS else _TILES[dtype]
    held = q * each if q * each < _COLUMNS else _COLUMNS
    query_tiles = -(-q * each // (_COLUMNS * tiles))
    missing = query_tiles * tiles * _COLUMNS - q * each if held == _COLUMNS else 0
    columns = columns.transpose(1, 2).reshape(q, columns.shape[2], each, units, 4, unit // 4)
    columns = columns.transpose(1, 2).flatten(0, 1)  # [columns, planes, units, 4, numbers of 16 bytes]
    columns = torch.nn.functional.pad(columns, (0, 0) * 4 + (0, missing))
    fragments = columns.view(query_tiles, tiles, held, *columns.shape[1:]).permute(0, 4, 3, 1, 2, 5, 6)
    return _Prepared(
        fragments.contiguous(), units, tiles, held, query_tiles, table, count, queries, units_of, sums
    )


def _split(x: Tensor, dtype: str) -> Tensor:
    """x: [Q, W] float32 -> [Q, 2, planes, W]: numbers of the cache's kind that add up to x."""
    if dtype == "float32":  # tensor cores take the upper 19 bits of each
        high = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        low = ((x - high).view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
        return torch.stack([high, low], 1)[:, :, None]
    if dtype == "float16":
        return float_terms(x, torch.float16, 2).transpose(0, 1)[:, :, None]
    terms = float_terms(x, torch.bfloat16, 3)
    columns = torch.stack([*terms, torch.zeros_like(terms[0])], 1)
    return columns.view(len(x), 2, 2, x.shape[1]).transpose(1, 2)


@kept(1 << 20)
def _segment_tables(segments: tuple[Segment, ...], width: int, unit: int) -> tuple[Tensor, Tensor]:
    """-> on the device that is named last: the number at each place of the segments' units, `width` for none,
    and [segments, 5] int32: first and last number, first unit, units before, block."""
    places, rows = [torch.empty(0, dtype=torch.int64, device="cpu")], []
    before = 0
    for begin, end, block in segments:
        first, last = begin // unit, -(-end // unit)
        place = torch.arange(first * unit, last * unit, device="cpu")
        places.append(place.where((place >= begin) & (place < end), width))
        rows.append((begin, end, first, before, block))
        before += last - first
    table = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 5)
    return torch.cat(places), table


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


topk_scan, topk_scan_both_ends = gpu_scan.ops(_Kernels())
