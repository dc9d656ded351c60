"""The vectors that a normalisation compares: of queries, and of the rows of a cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import ops
from rapidin.cache import Cache
from rapidin.cache.codec import Codec

NORMALIZE = ("layer", "none", "cosine")

_CHUNK_BYTES = 64 << 20  # of decoded rows that are held at a time


@dataclass(frozen=True, slots=True)
class ScanQuery:
    """What the scan needs. vectors: [Q, blocks, width] float32; normalize: how rows are scaled; factors:
    [rows, blocks] float32 on the CPU, by which each row's blocks are multiplied besides, or None."""

    vectors: Tensor
    normalize: str
    factors: Tensor | None = None

    def scales(
        self, code: Codec, fields: Mapping[str, Tensor], factors: Tensor | None = None
    ) -> Tensor | None:
        """Scale of each row's blocks: [n, blocks] float32, or None for none; factors: those of these rows."""
        scales = row_scales(code, fields, self.normalize)
        if factors is None:
            return scales
        return factors * ((code.lengths(fields) > 0) if scales is None else scales)


def row_scales(code: Codec, fields: Mapping[str, Tensor], normalize: str) -> Tensor | None:
    """s_nb of each row's blocks, from their lengths: [n, blocks] float32, or None where it is 1."""
    if normalize == "layer":
        return None
    lengths = code.lengths(fields)
    if normalize == "none":
        return lengths
    # In float64: the squares of small lengths leave float32's range.
    total = lengths.double().norm(dim=1, keepdim=True)
    return torch.where(total > 0, lengths / total, 0.0).float()


def query_vectors(sketch: Tensor, normalize: str) -> Tensor:
    """v of query sketches [Q, blocks, width]: the same shape, float32; for `layer` divided by the number of
    blocks, so that the sum over them is the mean."""
    unit, length = ops.unit_blocks(sketch)
    if normalize == "layer":
        return unit / sketch.shape[1]
    if normalize == "cosine":
        total = length.double().norm(dim=1)[:, None, None]
        return (sketch / torch.where(total > 0, total, 1.0)).float()
    return sketch.float()


def part_vectors(parts: Tensor, whole: Tensor, normalize: str) -> Tensor:
    """v of parts [Q, blocks, width] of query sketches, by the lengths of the whole ones they belong to (the
    same shape): parts that sum to a sketch have vectors that sum to its own. Float32."""
    if normalize == "none":
        return parts.float()
    length = ops.unit_blocks(whole)[1].double()
    if normalize == "cosine":
        length = length.norm(dim=1, keepdim=True)
    scale = torch.where(length > 0, 1 / length, 0.0)[:, :, None]
    if normalize == "layer":
        scale = scale / whole.shape[1]
    return (parts * scale).float()


def count(cache: Cache) -> int:
    """Rows of a cache that count."""
    return sum(int((part.status == 0).sum()) for _, part in cache.shards())


def counted(cache: Cache) -> Tensor:
    """Which rows of a cache count: [rows] bool on the CPU; of an unfinished one up to the last that is
    cached."""
    found = torch.zeros(cache.table_rows(1), dtype=torch.bool, device="cpu")
    for first, part in cache.shards():
        found[first : first + len(part.status)] = part.status == 0
    return found


def vectors_of(
    cache: Cache,
    normalize: str,
    device: torch.device,
    *,
    blocks: slice = slice(None),
    most: int | None = None,
    within: tuple[int, int] = (0, sys.maxsize),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(rows [n] int64 on the CPU, y [n, blocks, width] float32 and what |y|^2 should be [n, blocks] float64,
    both on `device`) of the rows that count, some at a time.

    blocks: which of them. most: no more than so many rows, evenly spaced. within: of shards from one row to
    before another, all of them. y is what the code tells of a row; few bits make it longer than the row was,
    whose length is kept apart.
    """
    code = cache.codec.to(device)
    size = max(1, _CHUNK_BYTES // (4 * cache.manifest.dim))
    step = 1 if most is None else max(1, -(-count(cache) // most))
    passed = 0
    for first, part in cache.shards(ahead=True, within=within):
        counted = (part.status == 0).nonzero()[:, 0]
        chosen = counted[-passed % step :: step]
        passed += len(counted)
        for places in torch.split(chosen, size):
            if not len(places):
                continue
            fields = {name: value[places].to(device) for name, value in part.tensors.items()}
            y = code.decode(fields)[:, blocks]
            scales = row_scales(code, fields, normalize)
            if scales is None:
                yield places + first, y, (code.lengths(fields)[:, blocks] > 0).double()
            else:
                scales = scales[:, blocks]
                yield places + first, y * scales[:, :, None], scales.double().square()


def block_groups(blocks: int, bytes_each: int, budget: int = 1 << 30) -> list[slice]:
    """Blocks in groups whose matrices fit into the budget, at least one a group."""
    size = max(1, budget // max(1, bytes_each))
    return [slice(at, min(at + size, blocks)) for at in range(0, blocks, size)]
