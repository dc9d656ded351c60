"""The ops on the CUDA C++ kernels of rapidin._cuda. Arguments have been checked; each function is one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rapidin.ops import tables
from rapidin.ops.flat_plan import flat_plan

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PACKED_DTYPES = {"int8": 3, "int4": 4, "sign": 5}

_extension: Any = None


def extension() -> Any:
    """rapidin._cuda, imported when first needed. Raises ImportError where it was not built."""
    global _extension
    if _extension is None:
        try:
            from rapidin import _cuda
        except ImportError as error:
            raise ImportError(
                "rapidin's CUDA kernels were not built: install from source where nvcc is found "
                "(RAPIDIN_CUDA=on says why if it fails), or ask for backend='triton'"
            ) from error
        _extension = _cuda
    return _extension


def use(module: Any) -> None:
    """Run on another build of the extension: the emulated one, in tests."""
    global _extension
    _extension = module


def emulated() -> bool:
    """Whether the kernels run on the CPU."""
    return _extension is not None and bool(_extension.emulated)


def place(x: Tensor) -> tuple[int, int]:
    """(device index, current stream) of a tensor's device, as the extension takes them."""
    if x.device.type != "cuda":
        return 0, 0
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


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
    device, n = tensors[0].device, len(tensors)
    plan = flat_plan(tensors, dim)
    if not plan.rows or not plan.batch:
        return (
            torch.zeros(plan.batch, dim, device=device),
            torch.zeros(plan.batch, n, device=device) if squares else None,
        )

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    out = room(plan.batch, dim)
    partial = room(plan.parts, plan.batch, dim) if plan.parts > 1 else None
    found = (
        (room(plan.batch, plan.rows), room(plan.slices, plan.batch, n), room(plan.batch, n))
        if squares
        else None
    )
    scales = scales.contiguous() if scales is not None else None
    extension().flat_sketch(
        plan.table.data_ptr(), n, plan.batch, plan.rows, plan.parts, plan.chunks_of_part, seed, dim,
        tables.places(seed, plan.groups, device).data_ptr(),
        scales.data_ptr() if scales is not None else 0,
        partial.data_ptr() if partial is not None else 0,
        out.data_ptr(),
        (*(x.data_ptr() for x in found), plan.slices) if found is not None else (0, 0, 0, 0),
        place(out),
    )  # fmt: skip
    return out, found[2] if found is not None else None
