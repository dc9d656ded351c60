"""topk_scan and topk_scan_both_ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.kernels import topk_scan as scan_kernels
from rapidin.ops import gpu_scan
from rapidin.ops.gpu_scan import (
    BEGINS,
    ENDS,
    Kept,
    Part,
    Segment,
    Step,
    float_terms,
    integer_planes,
    integer_queries,
    scaled_queries,
    steps_of_blocks,
)
from rapidin.ops.lifetimes import kept
from rapidin.ops.reference.packed import PER_BYTE

_PROGRAMS_A_MULTIPROCESSOR = 4
_SIMULATED = 3  # multiprocessors where there is no GPU
_TERMS = {"float32": 1, "float16": 2, "bfloat16": 3}
_KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Prepared:
    """Queries as rapidin.kernels.topk_scan takes them."""

    queries: Tensor
    units: Tensor  # [Q] float64
    sums: Tensor | None  # [Q] int64
    exact: Tensor  # [Q, width] float32, as they came
    planes: int
    terms: int
    segments: Tensor | None
    steps: Tensor | None  # of packed rows with blocks, whose segments count these
    tile: dict[str, int]


def multiprocessors(device: torch.device) -> int:
    """How many a device has; on the CPU, where kernels are interpreted, as if it were a small GPU."""
    if device.type != "cuda":
        return _SIMULATED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class ScanKernels:
    """gpu_scan.Kernels by Triton; multiprocessors: how many a device has, by which programs are counted."""

    def __init__(self, multiprocessors: Callable[[torch.device], int] = multiprocessors) -> None:
        self._multiprocessors = multiprocessors

    def prepare(self, part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> _Prepared:
        return prepare(part, queries, segments)

    def keep(self, prepared: _Prepared, q: int, k: int, ends: int, rows: int, device: torch.device) -> Kept:
        tile = prepared.tile
        running = _PROGRAMS_A_MULTIPROCESSOR * self._multiprocessors(device)
        programs = max(1, min(-(-rows // tile["R"]), running // -(-q // tile["Q"])))
        capacity = 1 << (max(2 * k, k + 2 * tile["R"]) - 1).bit_length()
        return Kept.none(programs, q, k, ends, capacity, device)

    def scan(self, step: Step) -> None:
        part, prepared, kept = step.part, step.prepared, step.kept
        scan_kernels.topk_scan(
            part.rows,
            part.rows.shape[1],
            prepared.queries,
            prepared.units,
            prepared.sums,
            prepared.exact,
            planes=prepared.planes,
            terms=prepared.terms,
            tile=prepared.tile,
            first=step.first,
            scale=part.scale,
            segments=prepared.segments,
            steps=prepared.steps,
            scales=step.scales,
            valid=None if step.valid is None else step.valid.view(torch.uint8),
            base=step.base,
            partial=step.partial,
            first_part=step.first_part,
            last_part=step.last_part,
            keys=kept.keys,
            counts=kept.counts,
            least=kept.least,
            after=step.after,
            k=kept.k,
            ends=kept.ends,
        )

    def merge(self, kept: Kept, outs: Sequence[tuple[Tensor, Tensor]]) -> None:
        scan_kernels.topk_merge(kept.keys, kept.counts, kept.least, kept.last, kept.k, kept.ends, list(outs))


def prepare(part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> _Prepared:
    """queries: [Q, width] float32 of one part."""
    dtype, q = part.dtype, len(queries)
    exact = queries if queries.stride(1) == 1 else queries.contiguous()
    planes = PER_BYTE.get(dtype, 0)
    if planes and segments is not None:
        return _prepare_steps(part, exact, tuple(segments))
    tile = scan_kernels.tile_of(_KINDS.get(dtype, part.rows.dtype), planes, q)
    few = q <= scan_kernels.FEW
    sums = None
    if planes:
        integers, units, sums = integer_queries(queries, dtype)
        whole = few and dtype == "int8"
        columns = integers[None] if whole else integer_planes(integers, dtype).transpose(0, 1)
        terms = 0 if few else 1
    else:
        scaled, units = scaled_queries(queries)
        terms = 0 if few else _TERMS[dtype]
        columns = scaled[None] if few else float_terms(scaled, _KINDS[dtype], terms)
    missing = 0 if few else -q % tile["Q"]
    columns = torch.nn.functional.pad(columns, (0, 0, 0, missing)).contiguous()
    table = None if segments is None else _segment_table(tuple(segments), queries.device)
    return _Prepared(columns, units, sums, exact, planes, terms, table, None, tile)


def _prepare_steps(part: Part, queries: Tensor, segments: tuple[Segment, ...]) -> _Prepared:
    """Queries for packed rows with blocks: floats that are multiplied by the codes' values."""
    numbers, steps, table = _step_tables(part.dtype, part.width, segments, queries.device)
    tile = scan_kernels.tile_of(torch.float16, 0, len(queries))
    tile["D"] = scan_kernels.STEP // 2  # more spill
    few = len(queries) <= scan_kernels.FEW
    scaled, units = scaled_queries(queries)
    scaled, exact = (torch.nn.functional.pad(x, (0, 1))[:, numbers] for x in (scaled, queries))
    terms = 0 if few else _TERMS["float16"]
    columns = scaled[None] if few else float_terms(scaled, torch.float16, terms)
    columns = torch.nn.functional.pad(columns, (0, 0, 0, 0 if few else -len(queries) % tile["Q"]))
    planes = PER_BYTE[part.dtype]
    return _Prepared(columns.contiguous(), units, None, exact, planes, terms, table, steps, tile)


@kept(32 << 20)
def _step_tables(dtype: str, width: int, segments: tuple[Segment, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """On the device given last: the number of a row at each place of the steps, `width` for none, [64 steps]
    int64; steps [steps, 2] int32: a group's first byte, a plane's first bit; segments [segments, 3]: first
    and last place, block."""
    numbers, steps, _ = steps_of_blocks(dtype, width, segments)
    begins = torch.nonzero(steps[:, 1] & BEGINS).flatten()
    ends = torch.nonzero(steps[:, 1] & ENDS).flatten() + 1
    size = numbers.shape[1]
    table = torch.stack([begins * size, ends * size, steps[begins, 2].long()], 1).int()
    flat = numbers.flatten().long()
    steps = torch.stack([steps[:, 0], steps[:, 1] >> 8], 1).contiguous()
    return flat.where(flat >= 0, width), steps, table.contiguous()


@kept(1 << 20)
def _segment_table(segments: tuple[Segment, ...]) -> Tensor:
    """The segments on the device given last."""
    return torch.tensor(segments, dtype=torch.int32, device="cpu").reshape(-1, scan_kernels.SEGMENT)


topk_scan, topk_scan_both_ends = gpu_scan.ops(ScanKernels())
