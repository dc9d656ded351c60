"""linear_sketch and flat_sketch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rapidin.ops import tables
from rapidin.ops.cuda.extension import DTYPES, device_and_stream, extension
from rapidin.ops.flat_plan import flat_plan
from rapidin.ops.low_rank import LowRank, preconditioned, preconditioned_dtype, products_with_high_and_low

# Blocks that share the tokens of a batch, whatever the device has room for: how sums are cut, and so their
# bits, is the same on every GPU.
_BLOCKS = 256
LINEAR_DIMS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def supports(op: str, *arguments: Any) -> bool:
    """Whether the extension has a kernel for these arguments of an op, so that it is the default for them."""
    return op != "linear_sketch" or supports_linear_sketch(*arguments)


def supports_linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> bool:
    """Whether there is a kernel: dim a power of two from 32 to 8,192, and enough shared memory."""
    if dim not in LINEAR_DIMS:
        return False
    dtypes = [
        DTYPES[preconditioned_dtype(x.dtype, low_rank)]
        for x, low_rank in ((inputs, inputs_low_rank), (grads, grads_low_rank))
    ]
    _, shared = extension().linear_sketch_tile(dim, *dtypes)
    return bool(shared <= extension().shared_bytes(device_and_stream(inputs)[0]))


def linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    if not supports_linear_sketch(inputs, grads, dim, inputs_low_rank, grads_low_rank):
        raise ValueError(
            f"linear_sketch: backend 'cuda' has no kernel for dim {dim} of {inputs.dtype} and {grads.dtype} "
            "on this device; ask for backend='triton'"
        )
    both = inputs.dtype == grads.dtype == torch.bfloat16
    if not (both and _adds(dim, inputs_low_rank)):
        inputs, inputs_low_rank = preconditioned(inputs, inputs_low_rank), None
    if not (both and _adds(dim, grads_low_rank)):
        grads, grads_low_rank = preconditioned(grads, grads_low_rank), None
    batch, tokens, n_in = inputs.shape
    n_out = grads.shape[2]
    device = inputs.device
    tile, _ = extension().linear_sketch_tile(dim, DTYPES[inputs.dtype], DTYPES[grads.dtype])
    tiles = -(-tokens // tile)
    splits = min(tiles, max(1, _BLOCKS // batch))
    share = -(-tiles // splits) * tile
    splits = -(-tokens // share)
    table_in = tables.columns(seed, tables.IN, n_in, dim, device, _staged(dim, inputs.element_size()))
    table_out = tables.columns(seed, tables.OUT, n_out, dim, device, _staged(dim, grads.element_size()))
    # Held until the launch
    term_in = _term(inputs, inputs_low_rank, seed, tables.IN, dim)
    term_out = _term(grads, grads_low_rank, seed, tables.OUT, dim)
    out = torch.empty(batch, dim, device=device, dtype=torch.float32)
    partial = out.new_empty(splits, min(batch, 65535), dim) if splits > 1 else out
    extension().linear_sketch(
        inputs.data_ptr(), DTYPES[inputs.dtype], n_in, inputs.stride(), table_in.data_ptr(),
        _addresses(term_in),
        grads.data_ptr(), DTYPES[grads.dtype], n_out, grads.stride(), table_out.data_ptr(),
        _addresses(term_out),
        batch, tokens, dim, splits, share, partial.data_ptr(), out.data_ptr(), device_and_stream(out),
    )  # fmt: skip
    return out


_Term = tuple[Tensor, Tensor, Tensor]


def _adds(dim: int, low_rank: LowRank | None) -> bool:
    """Whether the kernel adds a preconditioner to bfloat16 sides' count sketches, without reading features
    twice; narrow sides, whose matrix is formed, are preconditioned before."""
    if low_rank is None or low_rank.rank % 16 or low_rank.features <= 2 * low_rank.rank:
        return False
    return bool(low_rank.rank <= extension().linear_sketch_low_rank(dim))


def _term(x: Tensor, low_rank: LowRank | None, seed: int, side: tuple[int, int], dim: int) -> _Term | None:
    """CS(U), x times U in two parts, and the gain."""
    if low_rank is None:
        return None
    return low_rank.operands(seed, side, dim), products_with_high_and_low(x, low_rank), low_rank.gain


def _addresses(term: _Term | None) -> tuple[int, int, int, int]:
    if term is None:
        return 0, 0, 0, 0
    return term[0].data_ptr(), term[1].data_ptr(), term[2].data_ptr(), len(term[2])


@cache
def _staged(dim: int, itemsize: int) -> tables.Change:
    """The function that converts a column table to the kernel's, for elements of `itemsize` bytes."""

    def change(columns: Tensor) -> Tensor:
        table = torch.empty_like(columns)
        extension().linear_sketch_table(columns.data_ptr(), len(columns), dim, itemsize, table.data_ptr())
        return table

    return change


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    scales: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    device, n = tensors[0].device, len(tensors)
    plan = flat_plan(tensors, dim)

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    out = room(plan.batch, dim)
    partial = room(plan.parts, plan.batch, dim) if plan.parts > 1 else None
    square_sums = (
        (room(plan.batch, plan.rows), room(plan.slices, plan.batch, n), room(plan.batch, n))
        if squares
        else None
    )
    scales = scales.contiguous() if scales is not None else None
    permutations = tables.inverse_permutations(seed, plan.groups, device)  # held until the launch
    extension().flat_sketch(
        plan.table.data_ptr(), n, plan.batch, plan.rows, plan.parts, plan.chunks_of_part, seed, dim,
        permutations.data_ptr(),
        scales.data_ptr() if scales is not None else 0,
        partial.data_ptr() if partial is not None else 0,
        out.data_ptr(),
        (*(x.data_ptr() for x in square_sums), plan.slices) if square_sums is not None else (0, 0, 0, 0),
        device_and_stream(out),
    )  # fmt: skip
    return out, square_sums[2] if square_sums is not None else None
