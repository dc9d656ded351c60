"""topk_scan and topk_scan_both_ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.ops import gpu_scan
from rapidin.ops.cuda.extension import DTYPES, PACKED_DTYPES, device_and_stream, extension
from rapidin.ops.gpu_scan import Kept, Part, Segment, Step, numbers_of_bytes, steps_of_blocks
from rapidin.ops.lifetimes import kept

_FORMATS = {"float32": 0, "float16": 1, "bfloat16": 2, **PACKED_DTYPES}
_UNIT = 64  # bytes of a row that a warp takes at a time
_SCAN_ROWS = 256  # that a block takes at a time
_COLUMNS = 8  # of the tensor cores' second operand
# Tiles of columns that a block holds where there are more queries than fill one
_TILES = {"float32": 2, "float16": 4, "bfloat16": 4, "int8": 4, "int4": 2, "sign": 2}
_PLANES = {"bfloat16": 2, "int4": 2, "sign": 8}  # of fragments; 1 of others
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOCKS_A_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class _Prepared:
    """Queries as csrc/cuda/topk_scan.cuh takes them."""

    fragments: Tensor  # bytes [query tiles, units, planes, tiles, columns held, 4, 16], with blocks more
    units: int
    tiles: int
    columns_held: int
    query_tiles: int
    tables: Tables
    segment_count: int
    blocks: bool  # of packed rows
    queries: Tensor
    units_of: Tensor  # [Q] float64
    sums: Tensor | None  # [Q] int64


class ScanKernels:
    """gpu_scan.Kernels by the extension."""

    def prepare(self, part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> _Prepared:
        return prepare(part, queries, segments)

    def keep(self, prepared: _Prepared, q: int, k: int, ends: int, rows: int, device: torch.device) -> Kept:
        index, _ = device_and_stream(prepared.queries)
        running = _BLOCKS_A_MULTIPROCESSOR * extension().multiprocessors(index)
        blocks = max(1, min(-(-rows // _SCAN_ROWS), running // prepared.query_tiles))
        return Kept.none(blocks, q, k, ends, capacity_of(k), device)

    def scan(self, step: Step) -> None:
        part, prepared, kept, base = step.part, step.prepared, step.kept, step.base
        size = 1 if part.dtype in PACKED_DTYPES else part.rows.element_size()
        arguments = {
            **_kept_arguments(kept, len(prepared.queries)),
            "rows": part.rows.data_ptr(),
            "format": _FORMATS[part.dtype],
            "n": len(part.rows),
            "width": part.width,
            "stride_row": part.rows.stride(0) * size,
            "first": step.first,
            "scale": _address(part.scale),
            "scale_dtype": 0 if part.scale is None else DTYPES[part.scale.dtype],
            "stride_scale": 0 if part.scale is None else part.scale.stride(0),
            "blocks": prepared.blocks,
            "segments": prepared.tables[1].data_ptr(),
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
        extension().topk_scan(arguments, device_and_stream(part.rows))

    def merge(self, kept: Kept, outs: Sequence[tuple[Tensor, Tensor]]) -> None:
        arguments = _kept_arguments(kept, kept.keys.shape[1])
        (scores, indices), (low_scores, low_indices) = outs[0], outs[-1]
        extension().topk_merge(
            arguments, scores.data_ptr(), indices.data_ptr(), low_scores.data_ptr(), low_indices.data_ptr(),
            scores.stride(0), kept.last.data_ptr(), device_and_stream(scores),
        )  # fmt: skip


def capacity_of(k: int) -> int:
    """Capacity of a list of keys: room for k and for what a tile of rows may add."""
    return 1024 if k <= _SCAN_ROWS else 2048


def _kept_arguments(kept: Kept, q: int) -> dict[str, int]:
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
    dtype, q, device = part.dtype, len(queries), queries.device
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    packed = dtype in PACKED_DTYPES
    blocks = packed and segments is not None
    tables = unit_tables(dtype, part.width, None if segments is None else tuple(segments), device)
    numbers, table, steps = tables
    units, segment_count = len(numbers), 1 if segments is None else len(table)
    each = 3 if blocks else 1 if dtype in ("int4", "sign") else 2
    tiles = 1 if q * each <= _COLUMNS else 2 if blocks else _TILES[dtype]
    held = min(q * each, _COLUMNS)
    query_tiles = -(-q // (_COLUMNS * tiles // each))
    planes = 1 if blocks else _PLANES.get(dtype, 1)
    unit_bytes = planes * tiles * held * _UNIT + (16 + tiles * 4 * _COLUMNS if blocks else 0)
    fragments = torch.empty(query_tiles * units * unit_bytes, dtype=torch.uint8, device=device)
    units_of = torch.empty(2, q, dtype=torch.float64, device=device)
    sums = torch.empty(q, dtype=torch.int64, device=device) if packed and not blocks else None
    segment_sums = torch.empty(segment_count, q, each, dtype=torch.int32, device=device) if blocks else None
    arguments = {
        "queries": queries.data_ptr(),
        "q": q,
        "stride_query": queries.stride(0),
        "width": part.width,
        "format": _FORMATS[dtype],
        "blocks": blocks,
        "units": units,
        "planes": planes,
        "tiles": tiles,
        "columns_held": held,
        "query_tiles": query_tiles,
        "places": numbers.data_ptr(),
        "place_planes": numbers.shape[1],
        "steps": steps.data_ptr(),
        "segments": table.data_ptr(),
        "segment_count": segment_count,
        "segment_ints": table.shape[1],
        "segment_sums": _address(segment_sums),
        "units_of": units_of[0].data_ptr(),
        "inverse": units_of[1].data_ptr(),
        "sums": _address(sums),
        "fragments": fragments.data_ptr(),
    }
    extension().scan_queries(arguments, device_and_stream(queries))
    return _Prepared(
        fragments, units, tiles, held, query_tiles, tables, segment_count, blocks, queries, units_of[0], sums
    )


Tables = tuple[Tensor, Tensor, Tensor]


def made_tables(dtype: str, width: int, segments: tuple[Segment, ...] | None) -> Tables:
    """-> on the CPU, int32: numbers [units, planes, numbers of 64 bytes], the number of a row at each place
    of its units, -1 for none; segments [segments, 5]; steps [units, 4] of packed rows with blocks. The last
    two are described in csrc/cuda/launchers.h, and empty where there are none."""
    nothing = torch.empty(0, 4, dtype=torch.int32, device="cpu")
    if dtype not in PACKED_DTYPES:
        return *_float_tables(_UNIT // _SIZES[dtype], width, segments), nothing
    if segments is not None:
        numbers, steps, pieces = steps_of_blocks(dtype, width, segments)
        rows = [(begin, end, 0, 0, block) for begin, end, block in pieces]
        return numbers[:, None], torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 5), steps
    numbers = numbers_of_bytes(width, dtype)
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % _UNIT), value=-1)
    numbers = numbers.view(len(numbers), -1, _UNIT).transpose(0, 1)  # [groups, planes, bytes]
    return numbers.int().contiguous(), nothing, nothing


# The same on the device given last: 4 bytes for each number of a row.
unit_tables = kept(32 << 20)(made_tables)


def _float_tables(unit: int, width: int, segments: tuple[Segment, ...] | None) -> tuple[Tensor, Tensor]:
    """The tables of float rows: a unit in which a block begins or ends has places without a number."""
    numbers, rows = [torch.empty(0, unit, dtype=torch.int64, device="cpu")], []
    before = 0
    for begin, end, block in ((0, width, 0),) if segments is None else segments:
        first, last = begin // unit, -(-end // unit)
        number = torch.arange(first * unit, last * unit, device="cpu")
        numbers.append(number.where((number >= begin) & (number < end), -1).view(-1, unit))
        rows.append((begin, end, first, before, block))
        before += last - first
    rows = [] if segments is None else rows
    table = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 5)
    return torch.cat(numbers).int()[:, None].contiguous(), table


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


topk_scan, topk_scan_both_ends = gpu_scan.ops(ScanKernels())
