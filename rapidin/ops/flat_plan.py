"""What the GPU kernels of flat_sketch are told of a list of tensors: one table on the device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rapidin.ops.lifetimes import Kept

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROW = 128

# How the chunks are cut into parts depends on sizes alone, so that every machine adds in the same order.
_BLOCKS = 4096  # of 256 threads: several for each place that the largest GPU has for one
_LEAST_CHUNKS = 256  # in a part: one for each lane of a block
_CHUNK_STEP = 32

_SQUARE_ROWS = 16384  # of the longest tensor that one block sums
_SQUARE_SLICES = 32

# Kept, because gradients often have the same addresses again. Those of a captured call may have new ones.
kept_tables = Kept(1 << 20, reserve_bytes=64 << 10)


@dataclass(frozen=True)
class FlatPlan:
    """Tensors [B, numel], and how their rows are cut into parts.

    table: [5 n + parts + 2] int64 on the tensors' device: addresses; strides of the batch, in elements;
        numels; dtypes as in DTYPES; first rows, and how many rows there are; each part's first
        tensor, and the last tensor
    tensors: what the addresses point to
    slices: in how many the rows' squares are summed
    steps: halvings that find a row's tensor among those of its part
    """

    table: Tensor
    tensors: list[Tensor]
    batch: int
    width: int
    groups: int
    rows: int
    chunks: int
    parts: int
    chunks_of_part: int
    slices: int
    steps: int


def flat_plan(tensors: Sequence[Tensor], dim: int) -> FlatPlan:
    """tensors: [B, ...] each, at least one. Tensors that are not contiguous within an example are copied."""
    batch, device = len(tensors[0]), tensors[0].device
    width = min(dim, ROW)
    groups = dim // width
    flat = [x.reshape(batch, x[:1].numel()) for x in tensors]
    flat = [x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous() for x in flat]
    numels = [x.shape[1] for x in flat]
    counts = [-(-numel // width) for numel in numels]
    firsts = [0, *accumulate(counts)]
    rows = firsts[-1]
    chunks = -(-rows // groups)
    most_parts = min(-(-_BLOCKS // (groups * max(batch, 1))), -(-chunks // _LEAST_CHUNKS))
    chunks_of_part = -(-chunks // max(most_parts, 1))
    chunks_of_part = max(-(-chunks_of_part // _CHUNK_STEP) * _CHUNK_STEP, _CHUNK_STEP)
    parts = max(-(-chunks // chunks_of_part), 1)
    begins = [part * chunks_of_part * groups for part in range(parts)]
    part_tensors = [min(bisect_right(firsts, row), len(flat)) - 1 for row in begins] + [len(flat) - 1]
    listed = [x.data_ptr() for x in flat]
    listed += [x.stride(0) for x in flat]
    listed += numels
    listed += [DTYPES[x.dtype] for x in flat]
    listed += firsts
    listed += part_tensors
    most_tensors = max(part_tensors[part + 1] - part_tensors[part] for part in range(parts))
    return FlatPlan(
        table=kept_tables.get(
            tuple(listed), device, lambda: torch.tensor(listed, dtype=torch.int64, device="cpu")
        ),
        tensors=flat,
        batch=batch,
        width=width,
        groups=groups,
        rows=rows,
        chunks=chunks,
        parts=parts,
        chunks_of_part=chunks_of_part,
        slices=min(max(-(-max(counts) // _SQUARE_ROWS), 1), _SQUARE_SLICES),
        steps=most_tensors.bit_length(),
    )
