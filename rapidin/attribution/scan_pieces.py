"""What a scan reads: rows that several caches have in common, a piece at a time, on the CPU or a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rapidin.attribution.methods import ScanQuery
from rapidin.attribution.normalization import of_directions
from rapidin.cache import Cache
from rapidin.cache.resident import STATUS, HeldShard, Resident
from rapidin.cache.shards import Rows
from rapidin.errors import UserError
from rapidin.ops.transfer import CopyStream, Prefetcher

_CHOSEN_ROWS = 256  # of a piece, copied from their shard
ALL_ROWS = (0, sys.maxsize)

_FACTORS = "factors"


@dataclass(frozen=True)
class CacheScan:
    """A cache and the query that it is scanned for; the scores of several scans are added up."""

    cache: Cache
    query: ScanQuery


@dataclass(frozen=True)
class Resting:
    """The rows [low, high) of a shard on the device, in which the rows of a piece are kept."""

    shard: HeldShard
    low: int
    high: int


@dataclass(frozen=True)
class CacheRows:
    """The rows of one cache in a piece.

    tensors: the codec's, and the status [n]; factors: the query's factors of these rows [n, blocks], or None;
    zero_gradient: whether a block of one of them has zero gradient, None if that does not matter; resting:
    where they are kept on the device from this scan on; resident: whether the tensors are on the device.
    """

    tensors: Mapping[str, Tensor]
    factors: Tensor | None = None
    zero_gradient: bool | None = None
    resting: Resting | None = None
    resident: bool = False

    @property
    def status(self) -> Tensor:
        """0 for rows that count: [n]."""
        return self.tensors[STATUS]

    @property
    def stored(self) -> dict[str, Tensor]:
        """The codec's tensors."""
        return {name: value for name, value in self.tensors.items() if name != STATUS}

    def to(self, device: torch.device) -> CacheRows:
        """The same rows on a device, copied at once."""
        tensors = {name: value.to(device) for name, value in self.tensors.items()}
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, tensors=tensors, factors=factors)


@dataclass(frozen=True)
class Piece:
    """Rows that are scanned together. first: the number of the first; caches: the rows in each cache."""

    first: int
    caches: tuple[CacheRows, ...]

    def to_copy(self) -> dict[tuple[int, str], Tensor]:
        """The tensors that are not on the device yet, by number of the cache and name."""
        tensors: dict[tuple[int, str], Tensor] = {}
        for number, rows in enumerate(self.caches):
            if not rows.resident:
                tensors |= {(number, name): value for name, value in rows.tensors.items()}
            if rows.factors is not None:
                tensors[number, _FACTORS] = rows.factors
        return tensors

    def copied(self, tensors: Mapping[tuple[int, str], Tensor]) -> Piece:
        """The piece with the tensors of `to_copy` on the device."""
        caches = []
        for number, rows in enumerate(self.caches):
            of_cache = {name: value for (owner, name), value in tensors.items() if owner == number}
            factors = of_cache.pop(_FACTORS, None)
            caches.append(replace(rows, tensors=of_cache or rows.tensors, factors=factors))
        return replace(self, caches=tuple(caches))


def pieces(
    scans: Sequence[CacheScan],
    within: tuple[int, int] = ALL_ROWS,
    resident: Resident | None = None,
) -> Iterator[Piece]:
    """Rows that all caches hold, a shard at a time, on the CPU.

    within: the first row and the one after the last. Rows that `resident` holds are taken from the device.
    Raises UserError if the caches are not of the same examples.
    """
    check_same_examples([scan.cache for scan in scans])
    shards = [
        scan.cache.shards(ahead=resident is None or not resident.holds_all(scan.cache, within), within=within)
        for scan in scans
    ]
    # The shard of each cache that is being read, with its first row; None once a cache has no more.
    current: list[tuple[int, Rows] | None] = [next(each, None) for each in shards]
    while all(each is not None for each in current):
        opened = [each for each in current if each is not None]
        first = max(within[0], *(at for at, _ in opened))
        last = min(at + len(rows.index) for at, rows in opened)
        end = min(within[1], last)
        if first < end:
            rows_of_caches = (
                _rows_of(scan, at, rows, first, end, resident)
                for scan, (at, rows) in zip(scans, opened, strict=True)
            )
            yield Piece(first, tuple(rows_of_caches))
        current = [
            (at, rows) if at + len(rows.index) > last else next(each, None)
            for (at, rows), each in zip(opened, shards, strict=True)
        ]


def _rows_of(
    scan: CacheScan, at: int, rows: Rows, start: int, stop: int, resident: Resident | None
) -> CacheRows:
    """Rows [start, stop) of a cache, from its shard `rows`, whose first row is `at`."""
    low, high = start - at, stop - at
    stored = {name: value[low:high] for name, value in rows.tensors.items()}
    held = None if resident is None else resident.shard(scan.cache, at, rows)
    zero_gradient = _has_zero_gradient(scan, stored, rows.zero_gradient, (low, high))
    factors = None if scan.query.factors is None else scan.query.factors[start:stop]
    if held is not None and held.has(low, high):
        return CacheRows(held.rows(low, high), factors, zero_gradient, resident=True)
    resting = None if held is None else Resting(held, low, high)
    return CacheRows({**stored, STATUS: rows.status[low:high]}, factors, zero_gradient, resting)


def prefetched(
    stream: CopyStream,
    resident: Resident,
    scans: Sequence[CacheScan],
    within: tuple[int, int] = ALL_ROWS,
) -> Iterator[Piece]:
    """The same pieces on a device, copied ahead; rows that fit into its memory are kept."""
    resident.admit([scan.cache for scan in scans], within)
    batches = ((piece, piece.to_copy()) for piece in pieces(scans, within, resident))
    for piece, tensors in Prefetcher[Piece, tuple[int, str]](stream).carry(batches):
        on_device = piece.copied(tensors)
        for rows in on_device.caches:
            if rows.resting is not None:
                rows.resting.shard.fill(rows.resting.low, rows.resting.high, rows.tensors)
        yield on_device


def pieces_of(scan: CacheScan, chosen: Tensor) -> Iterator[Piece]:
    """Pieces of these rows [n], ascending, on the CPU; their numbers are positions among the chosen.

    Rows that the cache does not hold are left out.
    """
    factors = scan.query.factors
    for shard in scan.cache.manifest.shards:
        edges = torch.tensor([shard.first, shard.first + shard.rows], device="cpu")
        low, high = torch.searchsorted(chosen, edges).tolist()
        for start in range(low, high, _CHOSEN_ROWS):
            (first, rows), *_ = scan.cache.shards(within=(shard.first, shard.first + 1))
            some = chosen[start : min(high, start + _CHOSEN_ROWS)]
            stored = {name: value[some - first] for name, value in rows.tensors.items()}
            yield Piece(
                start,
                (
                    CacheRows(
                        {**stored, STATUS: rows.status[some - first]},
                        None if factors is None else factors[some],
                        _has_zero_gradient(scan, stored, {}, (0, len(some))),
                    ),
                ),
            )


def _has_zero_gradient(
    scan: CacheScan,
    stored: Mapping[str, Tensor],
    known: dict[tuple[int, int], bool],
    rows: tuple[int, int],
) -> bool | None:
    """Whether a block of one of these rows has zero gradient, None if that does not matter. known: of ranges
    of rows that were scanned."""
    if of_directions(scan.query.normalize) != "layer":
        return None
    if rows not in known:
        known[rows] = scan.cache.codec.has_zero_gradient(stored)
    return known[rows]


def check_same_examples(caches: Sequence[Cache]) -> None:
    """Raises UserError if these caches are not of the same examples."""
    first = caches[0]
    for other in caches[1:]:
        same = other.manifest.rows == first.manifest.rows
        if not same or other.manifest.data.get("identity") != first.manifest.data.get("identity"):
            raise UserError(
                f"the caches {first.path} and {other.path} are not of the same examples",
                "cache the same data for all of them",
            )
