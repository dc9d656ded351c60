"""The ops on the Triton kernels of rapidin.kernels. Arguments have been checked; each function is one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.kernels import flat_sketch as flat_kernels
from rapidin.ops import tables
from rapidin.ops.flat_plan import flat_plan


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    batched: bool,
    scales: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not batched:
        if not tensors:
            return torch.zeros(dim), torch.zeros(0) if squares else None
        listed = [x[None] for x in tensors]
        sketch, lengths = flat_sketch(listed, dim, seed=seed, batched=True, scales=scales, squares=squares)
        return sketch[0], None if lengths is None else lengths[0]
    device = tensors[0].device
    plan = flat_plan(tensors, dim)
    if not plan.rows or not plan.batch:
        none = torch.zeros(plan.batch, len(tensors), device=device) if squares else None
        return torch.zeros(plan.batch, dim, device=device), none
    places = tables.places(seed, plan.groups, device)
    scales = scales.contiguous() if scales is not None else None
    return flat_kernels.flat_sketch(plan, places, seed, scales, squares)
