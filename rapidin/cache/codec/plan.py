"""What a codec gives a scan: the protocols of codecs and prepared queries, and the plan of one scan.

A codec keeps the sketches of examples in few bytes. The sketch of an example is a row of blocks, one per
parameter, each scaled to length 1, and the lengths that the blocks had. A codec says which tensors a shard
stores for a row, and gives a scan what it reads: rows (float tensors or `ops.Packed`) whose inner products
with prepared queries add up to the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from rapidin import ops

LENGTHS = ("length", "size")  # the tensors that have the lengths of rows
_LENGTH_ROWS = 4096  # whose lengths are computed at a time on a CPU
TensorSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of one row of each tensor


@dataclass(frozen=True)
class ScanPlan:
    """One scan of some rows.

    parts: the tensors that `ops.topk_scan` reads, with queries [Q, D]; constant: [Q], added to the scores of
    all rows of a query; base: [Q, n], added to single scores, or None; scales and offsets: those of blocks,
    or None.
    """

    parts: list[Tensor | ops.Packed]
    queries: Tensor
    constant: Tensor
    base: Tensor | None = None
    scales: Tensor | None = None
    offsets: list[int] | None = None


# Concatenated queries by the identities of the tensors they were made of, which are kept with them.
JoinedQueries = dict[tuple[int, ...], tuple[list[Tensor], Tensor]]


def concatenate_plans(plans: Sequence[ScanPlan], joined: JoinedQueries | None = None) -> ScanPlan:
    """One scan whose scores are the sums of these plans' scores, all of the same rows and queries.

    joined: the concatenated queries of earlier calls: the same query tensors give the same result tensor.
    """
    if len(plans) == 1:
        return plans[0]
    joined = {} if joined is None else joined
    queries = [plan.queries for plan in plans]
    identities = tuple(map(id, queries))
    if identities not in joined:
        joined[identities] = queries, torch.cat(queries, 1)
    widths = [plan.queries.shape[1] for plan in plans]
    # All scores of a plan of width 0 are in its base: its one part, which a scan of it alone needs, is left
    # out here.
    parts = [rows for plan, width in zip(plans, widths, strict=True) if width for rows in plan.parts]
    scales, offsets = _concatenated_scales(plans)
    bases = [plan.base for plan in plans if plan.base is not None]
    if not parts:
        parts, scales, offsets = [plans[0].parts[0]], None, None
    return ScanPlan(
        parts,
        joined[identities][1],
        torch.stack([plan.constant for plan in plans]).sum(0),
        torch.stack(bases).sum(0) if bases else None,
        scales,
        offsets,
    )


def _concatenated_scales(plans: Sequence[ScanPlan]) -> tuple[Tensor | None, list[int] | None]:
    """The scales of the plans' blocks side by side and the blocks' offsets; (None, None) if none has any."""
    if all(plan.scales is None for plan in plans):
        return None, None
    columns, offsets = [], [0]
    for plan in plans:
        width = plan.queries.shape[1]
        if not width:
            continue
        start = offsets[-1]
        if plan.scales is None or plan.offsets is None:
            columns.append(plan.queries.new_ones(_row_count(plan.parts[0]), 1))
            offsets.append(start + width)
        else:
            columns.append(plan.scales)
            offsets += [start + offset for offset in plan.offsets[1:]]
    return (torch.cat(columns, 1), offsets) if columns else (None, None)


def _row_count(rows: Tensor | ops.Packed) -> int:
    return len(rows.codes if isinstance(rows, ops.Packed) else rows)


def typical_length(lengths: Tensor) -> Tensor:
    """The geometric mean of the lengths of rows' blocks [..., blocks] that are not 0: [...], 0 if all are."""
    # In place and by products: a scan computes it for all its rows, and `where` takes three times as long.
    live = (lengths > 0).to(lengths.dtype)
    count = live.sum(-1)
    least = lengths.new_tensor(torch.finfo(lengths.dtype).tiny)
    logs = torch.fmax(lengths, least).log_().mul_(live)  # unlike `clamp`, it makes a number of NaN
    return (logs.sum(-1) / count.clamp(min=1)).exp() * (count > 0)


def from_lengths(function: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """function(tensors), for a function that reads only `LENGTHS` and computes each row of its result [n,
    blocks] from that row.

    On a CPU it is called with a few thousand rows at a time, so that what it makes on the way stays in the
    processor's cache.
    """
    read = {name: tensors[name] for name in LENGTHS if name in tensors}
    rows = len(next(iter(read.values())))
    if rows <= _LENGTH_ROWS or any(x.device.type != "cpu" for x in read.values()):
        return function(read)
    out: Tensor | None = None
    for first in range(0, rows, _LENGTH_ROWS):
        some = function({name: x[first : first + _LENGTH_ROWS] for name, x in read.items()})
        if out is None:
            out = some.new_empty((rows, *some.shape[1:]))
        out[first : first + len(some)] = some
    assert out is not None
    return out


class Codec(Protocol):
    """How a cache stores sketches."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the tensors of `tensor_specs`."""

    def tensor_specs(self) -> TensorSpecs:
        """dtype and shape of a row of each tensor of a shard."""

    def encode(self, unit: Tensor, length: Tensor) -> dict[str, Tensor]:
        """Unit blocks [n, blocks, width] float32 and their lengths [n, blocks] -> the tensors of a shard."""

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Approximate unit blocks of encoded rows: [n, blocks, width] float32."""

    def lengths(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Lengths of the blocks: [n, blocks] float32. tensors: only those of `LENGTHS` are read."""

    def typical_lengths(self, tensors: Mapping[str, Tensor], zero_gradient: bool | None = None) -> Tensor:
        """`typical_length` of each row: [n] float32. tensors: only those of `LENGTHS` are read;
        zero_gradient: what `has_zero_gradient` says of these rows, if it is known."""

    def to(self, device: torch.device) -> Codec:
        """The same codec with its basis on `device`, where the tensors given to it then have to be."""

    def has_zero_gradient(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a plan without scales needs some all the same, since a block of a row has zero gradient."""

    def prepare(self, vectors: Tensor) -> PreparedQuery:
        """Query vectors [Q, blocks, width] in the codec's coordinates, to be scanned against each shard."""


class PreparedQuery(Protocol):
    """Queries in a codec's coordinates."""

    def plan(
        self, tensors: Mapping[str, Tensor], scales: Tensor | None, zero_gradient: bool | None = None
    ) -> ScanPlan:
        """The scan of a shard's rows, whose blocks are multiplied by `scales` [n, blocks], if any, or by one
        number a row, [n, 1], with which packed rows are still scanned in integers.

        zero_gradient: what the codec's `has_zero_gradient` says of these rows, if it is known. Otherwise it
        is computed, which makes a GPU wait.
        """


def spec_bytes(specs: TensorSpecs) -> int:
    """Bytes of a row in tensors of these dtypes and shapes."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in specs.values())
