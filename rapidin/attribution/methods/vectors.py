"""What a cache is scanned for, and the vectors of its rows as a normalization compares them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rapidin.attribution.normalization import of_directions, row_factors, row_scales
from rapidin.cache import Cache, Manifest
from rapidin.cache.codec import Codec
from rapidin.cache.codec.plan import LENGTHS, from_lengths

_TYPICAL_ROWS, _TYPICAL_SHARDS = 1024, 8  # that a mean factor is of, at most about
_CHUNK_BYTES = 64 << 20  # of decoded rows that are held at a time


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a method reads and holds. Only `moment_rows` changes results.

    block_bytes: of the matrices of the blocks that are inverted together; sent_bytes: of the sums that a
    process is sent at a time; moment_rows: the most rows that a second moment is computed from, by default as
    many as change it much.
    """

    block_bytes: int = 1 << 30
    sent_bytes: int = 256 << 20
    moment_rows: int | None = None

    def most_rows(self, width: int) -> int:
        """The most rows that a second moment of sketches of this width is computed from."""
        return max(8192, 16 * width) if self.moment_rows is None else self.moment_rows


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class ScanQuery:
    """What a cache is scanned for.

    vectors: [Q, blocks, width] float32; normalize: the normalization by which they were made, and by which
    rows are scaled; factors: [rows, blocks] float32 on the CPU, by which each row's blocks are also
    multiplied, or None.
    """

    vectors: Tensor
    normalize: str
    factors: Tensor | None = None

    def scales(
        self,
        codec: Codec,
        tensors: Mapping[str, Tensor],
        factors: Tensor | None = None,
        zero_gradient: bool | None = None,
    ) -> Tensor | None:
        """The scale of each row's blocks: [n, blocks] float32, [n, 1] if those of a row have the same, or
        None if all are 1.

        tensors: the codec's, of these rows; factors: the query's factors of these rows; zero_gradient: what
        the codec says of them, if it is known.
        """
        if factors is None and self.normalize == "layer":
            return None
        if factors is None and self.normalize == "weighted":
            return row_factors(codec.typical_lengths(tensors, zero_gradient))
        scales = shard_scales(codec, tensors, self.normalize)
        return scales if factors is None else factors * scales


def shard_scales(codec: Codec, tensors: Mapping[str, Tensor], normalize: str) -> Tensor:
    """`row_scales` of rows with these tensors of a shard: [n, blocks] float32."""
    return from_lengths(lambda some: row_scales(codec.lengths(some), normalize), tensors)


def count(cache: Cache) -> int:
    """The number of rows of a cache that count."""
    return sum(int((shard.status == 0).sum()) for _, shard in cache.shards())


def counted(cache: Cache) -> Tensor:
    """Which rows of a cache count: [rows] bool on the CPU; of an unfinished cache, the rows up to the last
    cached one."""
    counts = torch.zeros(cache.table_rows(1), dtype=torch.bool, device="cpu")
    for first, shard in cache.shards():
        counts[first : first + len(shard.status)] = shard.status == 0
    return counts


def known_normalization(cache: Cache, normalize: str) -> str:
    """The normalization, or `layer` instead of `weighted` if a cache has one sketch of all layers together,
    whose length is not that of a gradient."""
    whole = cache.manifest.sketch["projection"] == "rapidgrad"
    return of_directions(normalize) if whole else normalize


def mean_factor(cache: Cache, normalize: str) -> float:
    """The mean of the rows' factors (`rapidin.attribution.normalization.row_factors`), 1 without any.

    Of a large cache it is that of some rows in a few shards, since the first look at a shard reads all of it.
    """
    if normalize != "weighted":
        return 1.0
    known = _mean_factors.get(cache)
    if known is None or known[0] is not cache.manifest:
        known = _mean_factors[cache] = cache.manifest, _mean_factor(cache)
    return known[1]


_mean_factors: WeakKeyDictionary[Cache, tuple[Manifest, float]] = WeakKeyDictionary()


def _mean_factor(cache: Cache) -> float:
    shards = cache.manifest.shards
    chosen = shards[:: -(-len(shards) // _TYPICAL_SHARDS) or 1]
    step = max(1, sum(shard.rows for shard in chosen) // _TYPICAL_ROWS)
    total, count = 0.0, 0
    for of_file in chosen:
        for _, shard in cache.shards(within=(of_file.first, of_file.first + 1)):
            some = (shard.status == 0).nonzero()[::step, 0]
            read = {name: value[some] for name, value in shard.tensors.items() if name in LENGTHS}
            factors = row_factors(cache.codec.typical_lengths(read))
            total += float(factors.double().sum())
            count += int((factors > 0).sum())
    return total / count if count else 1.0


def stored_sketches(cache: Cache, rows: Sequence[int]) -> Tensor:
    """The sketches of rows as a cache has them: [n, blocks, width]."""
    unit = cache.sketches(list(rows)).view(len(rows), len(cache.layers), -1)
    return unit * cache.lengths(list(rows))[:, :, None]


def vectors_of(
    cache: Cache,
    normalize: str,
    device: torch.device,
    *,
    blocks: slice = slice(None),
    most: int | None = None,
    within: tuple[int, int] = (0, sys.maxsize),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The rows that count, in chunks: (row numbers [n] int64 on the CPU, y [n, blocks, width] float32, |y|^2
    [n, blocks] float64), the last two on `device`.

    blocks: which blocks. most: at most that many rows, evenly spaced. within: only shards between these rows
    (first, end). y is decoded; a codec of few bits makes it longer than the gradient was, so |y|^2 comes from
    the lengths, which are stored apart.
    """
    codec = cache.codec.to(device)
    size = max(1, _CHUNK_BYTES // (4 * cache.manifest.dim))
    step = 1 if most is None else max(1, -(-count(cache) // most))
    passed = 0
    for first, shard in cache.shards(ahead=True, within=within):
        usable = (shard.status == 0).nonzero()[:, 0]
        chosen = usable[-passed % step :: step]
        passed += len(usable)
        for rows in torch.split(chosen, size):
            if not len(rows):
                continue
            tensors = {name: value[rows].to(device) for name, value in shard.tensors.items()}
            y = codec.decode(tensors)[:, blocks]
            scales = row_scales(codec.lengths(tensors), normalize)[:, blocks]
            if normalize != "layer":  # the blocks are decoded at length 1
                y = y * scales[:, :, None]
            yield rows + first, y, scales.double().square()


def block_groups(blocks: int, bytes_each: int, budget: int) -> list[slice]:
    """Blocks in groups whose matrices fit into the budget, with at least one block in a group."""
    size = max(1, budget // max(1, bytes_each))
    return [slice(at, min(at + size, blocks)) for at in range(0, blocks, size)]
