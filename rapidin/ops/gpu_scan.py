"""The part of topk_scan that both GPU backends share: converts queries, and picks kernels for rows.

No step waits for the device. Before a CUDA graph is captured, the same scan must have run once, which creates
its tables (rapidin.ops.lifetimes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from rapidin.ops.lifetimes import kept
from rapidin.ops.packed import Packed, packed_bytes
from rapidin.ops.reference.packed import BITS, GROUP, PER_BYTE

TOP, BOTTOM = 1, 2  # which ends are wanted, as bits
SCORED_ROWS = 256  # rows whose scores are all kept, each as a place of their ranking
LONGEST = 1024  # places of a ranking that one pass over the rows fills
QUERIES = 256  # that one pass takes
CHUNK_BYTES = 64 << 20
MAX_ROWS = 2**31 - 1  # a key has 31 bits for the row's index

LIMITS = {"int8": 4095, "int4": 127, "sign": 127}  # of an integer query
_LONGEST_BLOCK = 1 << 16  # numbers whose products with queries' digits are summed in 32 bits
_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

Ranking = tuple[Tensor, Tensor]  # scores [Q, k] float32, indices [Q, k] int64
Segment = tuple[int, int, int]  # the first number of a part's piece of a block, the one past it, the block


@dataclass(frozen=True)
class Part:
    """One part of the cache, numbers [first, first + width) of a row; dtype names what it holds."""

    rows: Tensor  # [N, numbers or bytes], neighbours in memory
    dtype: str
    width: int
    first: int
    scale: Tensor | None  # [N]


@dataclass(frozen=True)
class Kept:
    """The best keys so far, each program's own: an int64 is better if it is larger, 0 is none."""

    keys: Tensor  # [programs, Q, ends, capacity] int64
    counts: Tensor  # [programs, Q, ends] int32
    least: Tensor  # [Q, ends] int64: what is not better need not be kept
    last: Tensor  # [Q, ends] int64: the last key that the merge found
    k: int
    ends: int

    @staticmethod
    def none(programs: int, q: int, k: int, ends: int, capacity: int, device: torch.device) -> Kept:
        """Empty lists of `capacity` keys each."""
        lists = (q, ends.bit_count())
        shared = 2 * lists[0] * lists[1]  # ints of `least`; one launch fills both
        state = torch.zeros(shared + programs * shared // 2, dtype=torch.int32, device=device)
        return Kept(
            keys=torch.empty(programs, *lists, capacity, dtype=torch.int64, device=device),
            counts=state[shared:].view(programs, *lists),
            least=state[:shared].view(torch.int64).view(lists),
            last=torch.empty(*lists, dtype=torch.int64, device=device),
            k=k,
            ends=ends,
        )

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def programs(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True)
class Step:
    """One part's products with rows [first, first + n) of the cache."""

    part: Part  # these rows of it
    prepared: Any  # the queries, as the backend's `prepare` made them
    first: int
    scales: Tensor | None  # [n, blocks]
    valid: Tensor | None  # [n]
    base: Tensor | None  # [Q, n]
    partial: Tensor | None  # [Q, n] float64: sums over the parts before this one
    first_part: bool
    last_part: bool
    kept: Kept
    after: Tensor | None  # [Q, ends] int64: only keys below count


class Kernels(Protocol):
    """What a backend brings."""

    def prepare(self, part: Part, queries: Tensor, segments: Sequence[Segment] | None) -> Any:
        """queries: [Q, width] float32 of this part -> what `scan` takes"""

    def keep(self, prepared: Any, q: int, k: int, ends: int, rows: int, device: torch.device) -> Kept:
        """Room for what `scan` keeps, empty; `prepared` of the last part."""

    def scan(self, step: Step) -> None:
        """Adds the part to `partial`, or with the last part to `base`, and keeps the best k of each end."""

    def merge(self, kept: Kept, outs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The best k of all, in order, to scores and indices [Q, k] of each end; the last to kept.last."""


def ops(kernels: Kernels, chunk_bytes: int = CHUNK_BYTES) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """topk_scan and topk_scan_both_ends by a backend's kernels, as the table of backends wants them.

    chunk_bytes: of the sums over several parts, for one chunk of rows.
    """

    def topk_scan(
        cache: Sequence[Tensor | Packed], queries: Tensor, k: int, *, largest: bool, **more: Any
    ) -> Ranking:
        end = TOP if largest else BOTTOM
        return scan(kernels, cache, queries, k, end, chunk_bytes=chunk_bytes, **more)[0]

    def topk_scan_both_ends(
        cache: Sequence[Tensor | Packed],
        queries: Tensor,
        k: int,
        *,
        scores: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        top, bottom = scan(kernels, cache, queries, k, TOP | BOTTOM, chunk_bytes=chunk_bytes, **more)
        if scores is not None:
            _fill_scores(partial(scan, kernels, chunk_bytes=chunk_bytes), cache, queries, scores, **more)
        return (*top, *bottom)

    return topk_scan, topk_scan_both_ends


def scan(
    kernels: Kernels,
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    k: int,
    ends: int,
    *,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    made: dict[Any, Any] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[Ranking]:
    """Scores and indices of each end that is wanted; made: these queries as earlier scans prepared them.

    Raises ValueError on a cache of too many rows.
    """
    parts = list(_parts(cache))
    n = len(parts[0].rows)
    if n > MAX_ROWS:
        raise ValueError(f"topk_scan: a GPU scans {MAX_ROWS} rows at most, got {n}; scan them in pieces")
    k = min(k, n)
    outs = [_empty_ranking(len(queries), k, queries.device) for end in (TOP, BOTTOM) if ends & end]
    if k == 0 or len(queries) == 0:
        return outs
    scales, base = _rows_in_memory(scales), _rows_in_memory(base)
    valid = valid.contiguous() if valid is not None else None
    for q in range(0, len(queries), QUERIES):
        some = slice(q, q + QUERIES)
        prepared = _prepared(kernels, parts, queries[some], offsets, (q, made))
        _scan_some(
            kernels, chunk_bytes, parts, prepared, len(queries[some]), k, ends, scales, valid,
            None if base is None else base[some], [(x[some], y[some]) for x, y in outs],
        )  # fmt: skip
    return outs


def _fill_scores(
    scan: Callable[..., list[Ranking]],
    cache: Sequence[Tensor | Packed],
    queries: Tensor,
    scores: Tensor,
    *,
    scales: Tensor | None,
    offsets: Sequence[int] | None,
    valid: Tensor | None,
    base: Tensor | None,
    made: dict[Any, Any] | None = None,
) -> None:
    """scores: [S, N], filled with the scores of the first S queries. `SCORED_ROWS` rows at a time are ranked:
    to keep a row's score elsewhere, too, would take registers and a write of each kernel, for what is asked
    once a query."""
    kept = None if made is None else made.setdefault(("scored", len(scores)), {})
    for first in range(0, scores.shape[1], SCORED_ROWS):
        rows = slice(first, min(scores.shape[1], first + SCORED_ROWS))
        ((found, index),) = scan(
            [_rows_of(part, rows) for part in cache],
            queries[: len(scores)],
            rows.stop - first,
            TOP,
            scales=None if scales is None else scales[rows],
            offsets=offsets,
            valid=None if valid is None else valid[rows],
            base=None if base is None else base[: len(scores), rows],
            made=kept,
        )
        # Missing places, of index -1, go to one more column.
        places = scores.new_full((len(scores), rows.stop - first + 1), torch.nan)
        places.scatter_(1, index % places.shape[1], found)
        scores[:, rows] = places[:, :-1]


def _rows_of(part: Tensor | Packed, rows: slice) -> Tensor | Packed:
    if isinstance(part, Tensor):
        return part[rows]
    scale = None if part.scale is None else part.scale[rows]
    return replace(part, codes=part.codes[rows], scale=scale)


def _prepared(
    kernels: Kernels,
    parts: list[Part],
    queries: Tensor,
    offsets: Sequence[int] | None,
    kept: tuple[int, dict[Any, Any] | None],
) -> list[Any]:
    """The queries prepared for each part, now or by an earlier scan; kept: their number, and `made`."""
    number, made = kept
    stream = None
    if queries.device.type == "cuda":
        stream = torch.cuda.current_stream(queries.device)
        if torch.cuda.is_current_stream_capturing():
            made = None  # a graph's tensors are filled only when it runs
    all_prepared = []
    for part in parts:
        segments = None if offsets is None else tuple(_segments(part, offsets))
        key = (type(kernels), number, part.first, part.width, part.dtype, segments, stream)
        ready = None if made is None else made.get(key)
        if ready is None:
            ready = kernels.prepare(part, queries[:, part.first : part.first + part.width], segments)
            if made is not None:
                made[key] = ready
        all_prepared.append(ready)
    return all_prepared


def _scan_some(
    kernels: Kernels,
    chunk_bytes: int,
    parts: list[Part],
    prepared: list[Any],
    q: int,
    k: int,
    ends: int,
    scales: Tensor | None,
    valid: Tensor | None,
    base: Tensor | None,
    outs: list[tuple[Tensor, Tensor]],
) -> None:
    n, device = len(parts[0].rows), outs[0][0].device
    # The sums over the parts decide how many rows are taken at a time.
    several = len(parts) > 1
    chunk = min(n, max(1024, chunk_bytes // (8 * q) // 1024 * 1024)) if several else n
    partial = torch.empty(q, chunk, dtype=torch.float64, device=device) if several else None
    after = None
    for done in range(0, k, LONGEST):
        kept = kernels.keep(prepared[-1], q, min(LONGEST, k - done), ends, min(chunk, n), device)
        for begin in range(0, n, chunk):
            rows = slice(begin, min(n, begin + chunk))
            for i, part in enumerate(parts):
                scale = None if part.scale is None else part.scale[rows]
                these = Part(part.rows[rows], part.dtype, part.width, part.first, scale)
                kernels.scan(
                    Step(
                        part=these,
                        prepared=prepared[i],
                        first=begin,
                        scales=None if scales is None else scales[rows],
                        valid=None if valid is None else valid[rows],
                        base=None if base is None else base[:, rows],
                        partial=partial,
                        first_part=i == 0,
                        last_part=i == len(parts) - 1,
                        kept=kept,
                        after=after,
                    )
                )
        kernels.merge(kept, [(x[:, done : done + kept.k], y[:, done : done + kept.k]) for x, y in outs])
        after = kept.last


def _parts(cache: Sequence[Tensor | Packed]) -> Iterator[Part]:
    first = 0
    for rows in cache:
        codes = rows if isinstance(rows, Tensor) else rows.codes
        dtype = _FLOATS[rows.dtype] if isinstance(rows, Tensor) else rows.dtype
        width = rows.shape[1] if isinstance(rows, Tensor) else rows.width
        scale = None if isinstance(rows, Tensor) else rows.scale
        yield Part(_rows_in_memory(codes), dtype, width, first, scale)
        first += width


def _rows_in_memory(x: Any) -> Any:
    """The same, each row's numbers neighbours in memory."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _segments(part: Part, offsets: Sequence[int]) -> Iterator[Segment]:
    for block, (begin, end) in enumerate(pairwise(offsets)):
        begin, end = max(begin - part.first, 0), min(end - part.first, part.width)
        if begin < end:
            yield begin, end, block


def _empty_ranking(queries: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = (queries, k)
    return torch.empty(size, device=device), torch.empty(size, dtype=torch.int64, device=device)


# ---- queries ----


def scaled_queries(queries: Tensor) -> tuple[Tensor, Tensor]:
    """queries: [Q, W] -> the same with a largest magnitude in [2^13, 2^14), [Q, W] float32, and what 1 of it
    stands for, a power of two, [Q] float64; zeros and NaN for a query with NaN or Inf."""
    largest, finite = _largest(queries)
    step = torch.exp2((torch.frexp(largest).exponent - 14).double())
    step = step.where(largest > 0, 1.0)
    scaled = (queries.where(finite[:, None], 0.0).double() / step[:, None]).float()
    return scaled, step.where(finite, torch.nan)


def float_terms(x: Tensor, kind: torch.dtype, terms: int) -> Tensor:
    """x: [Q, W] float32 -> [terms, Q, W] of a kind that add up to x."""
    summands = []
    for _ in range(terms):
        summands.append(x.to(kind))
        x = x - summands[-1].float()
    return torch.stack(summands)


def integer_queries(queries: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """queries: [Q, W] of a packed part -> integers [Q, W] int16, what 1 of them stands for [Q] float64, their
    sums [Q] int64: the integers of csrc/cpu/topk_scan.cpp, by the same operations in float64."""
    largest, finite = _largest(queries)
    largest = largest.double()
    # By tensors, as torch divides: for a plain number it would take a reciprocal, on a GPU on either side.
    limit = torch.full_like(largest, LIMITS[dtype])
    inverse = (limit / largest).where(largest > 0, 0.0)
    integers = (queries.where(finite[:, None], 0.0).double() * inverse[:, None]).round().to(torch.int16)
    return integers, (largest / limit).where(finite, torch.nan), integers.sum(1, dtype=torch.int64)


def integer_planes(integers: Tensor, dtype: str) -> Tensor:
    """integers: [Q, W] int16 -> [Q, planes, bytes of a row] int8: what each byte's plane is multiplied with.

    "int8" has no planes of its own, but integers of two parts: low + 64 * high.
    """
    if dtype == "int8":
        high = (integers + 32) >> 6
        return torch.stack([integers - 64 * high, high], 1).to(torch.int8)
    padded = torch.nn.functional.pad(integers.to(torch.int8), (0, 1))
    width = integers.shape[1]
    numbers = _padded_numbers_of_bytes(width, dtype, integers.device)
    return padded[:, numbers.flatten()].view(len(integers), *numbers.shape)


@kept(32 << 20)
def _padded_numbers_of_bytes(width: int, dtype: str) -> Tensor:
    """`numbers_of_bytes`, on the device given last, with `width` in place of -1."""
    numbers = numbers_of_bytes(width, dtype)
    return numbers.where(numbers >= 0, width)


def numbers_of_bytes(width: int, dtype: str) -> Tensor:
    """-> [planes, bytes] int64 on the CPU: which number of a row each byte's plane holds, -1 for none."""
    planes = PER_BYTE[dtype]
    byte = torch.arange(packed_bytes(width, dtype), device="cpu")  # type: ignore[arg-type]
    begin = byte // GROUP * GROUP * planes
    in_group = (width - begin).clamp_max(GROUP * planes)
    size = (in_group + planes - 1) // planes
    position = torch.arange(planes, device="cpu")[:, None] * size + byte % GROUP
    return (begin + position).where(position < in_group, -1)


# Of a step: its bytes are others than the last one's; it is its block's first, its last.
NEWGROUP, BEGINS, ENDS = 1, 2, 4


def steps_of_blocks(
    dtype: str, width: int, segments: Sequence[Segment]
) -> tuple[Tensor, Tensor, list[Segment]]:
    """The steps of a scan of packed rows with blocks: one for each plane of a group of bytes and each block
    that has numbers in it, in the order of the numbers.

    -> on the CPU: numbers [steps, 64] int32, the number of each byte's plane or -1 where the block has none
    there; steps [steps, 4] int32: the group's first byte, the plane's first bit << 8 | flags, the block's
    column of scales, the piece; pieces: the segments, in pieces of which 32 bits hold a sum.
    """
    pieces = [
        (first, min(end, first + _LONGEST_BLOCK), block)
        for begin, end, block in segments
        for first in range(begin, end, _LONGEST_BLOCK)
    ]
    numbers = numbers_of_bytes(width, dtype)
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % GROUP), value=-1)
    flat = numbers.view(len(numbers), -1, GROUP).transpose(0, 1).reshape(-1, GROUP)  # [groups * planes, 64]
    # Planes are numbers in a row, and so are pieces: a step begins where either does.
    planes = torch.nonzero(flat[:, 0] >= 0).flatten()
    first = flat[planes, 0]
    begins, ends, blocks = torch.tensor(pieces, dtype=torch.int64, device="cpu").reshape(-1, 3).T.contiguous()
    edges = torch.unique(torch.cat([first, begins]))
    plane = planes[torch.searchsorted(first, edges, right=True) - 1]
    piece = torch.searchsorted(begins, edges, right=True) - 1
    number = flat[plane]
    in_piece = (number >= edges[:, None]) & (number < ends[piece, None])
    group, bit = plane // PER_BYTE[dtype], plane % PER_BYTE[dtype] * BITS[dtype]
    change = torch.ones(len(edges) + 1, dtype=torch.bool, device="cpu")
    new_group = change[:-1].clone()
    new_group[1:] = group[1:] != group[:-1]
    change[1:-1] = piece[1:] != piece[:-1]
    flags = NEWGROUP * new_group.long() + BEGINS * change[:-1].long() + ENDS * change[1:].long()
    steps = torch.stack([group * GROUP, bit << 8 | flags, blocks[piece], piece], 1)
    return number.where(in_piece, -1).int(), steps.int().contiguous(), pieces


def _largest(queries: Tensor) -> tuple[Tensor, Tensor]:
    """-> the largest magnitude [Q] float32, 0 where the query has NaN or Inf, and whether it has none [Q]."""
    if queries.shape[1] == 0:
        return queries.new_zeros(len(queries)), queries.new_ones(len(queries), dtype=torch.bool)
    finite = queries.isfinite().all(1)
    return queries.abs().amax(1).where(finite, 0.0), finite
