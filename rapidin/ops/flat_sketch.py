"""flat_sketch: one small vector from a list of gradient tensors, each element read once."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_same_device, check_sketch, check_tensor, nothing

ROW = 128


@overload
def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    batched: bool = False,
    scales: Tensor | None = None,
    squares: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    batched: bool = False,
    scales: Tensor | None = None,
    squares: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    batched: bool = False,
    scales: Tensor | None = None,
    squares: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sketches the concatenation of `tensors` (each starts a new row of 128) to `dim` numbers.

    tensors: any shapes, float32, float16 or bfloat16; batched: axis 0 of each is the batch, of one size B
    dim: a multiple of 128, or a power of two below 128
    scales: [n] float32, one for each tensor, which is sketched as if multiplied by it
    -> [dim] float32, or [B, dim] when batched; with squares=True that and the squared length of each tensor
    without its scale, [n] float32, or [B, n] when batched

    The sketch is linear, and the dot product of two sketches estimates that of the two lists without bias.
    Tensors that are not contiguous within an example are copied. Raises TypeError or ValueError on arguments
    that are not as above.
    """
    op = "flat_sketch"
    check_sketch(op, dim, seed)
    if dim % ROW and (dim > ROW or dim & (dim - 1)):
        raise ValueError(
            f"{op}: dim must be a multiple of {ROW}, or a power of two below it, got {dim}; "
            f"take {-(-dim // ROW) * ROW}"
        )
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: tensors must be a list of tensors, got one tensor; pass [tensor]")
    tensors = list(tensors)
    for i, x in enumerate(tensors):
        check_tensor(op, f"tensors[{i}]", x, SKETCHED)
        if x.device != tensors[0].device:
            raise ValueError(
                f"{op}: all tensors must be on one device, got '{tensors[0].device}' and '{x.device}'"
            )
        if batched and (x.ndim == 0 or len(x) != len(tensors[0])):
            raise ValueError(
                f"{op}: batched tensors must have one batch size on axis 0, got shapes "
                f"{tuple(tensors[0].shape)} and {tuple(x.shape)} (tensors[{i}])"
            )
    if batched and not tensors:
        raise ValueError(f"{op}: batched needs at least one tensor to know the batch size, got an empty list")
    rows = sum(-(-(x[0].numel() if batched and len(x) else x.numel()) // ROW) for x in tensors)
    if rows >= 2**32:
        raise ValueError(
            f"{op}: at most 2**32 rows of {ROW} elements, got {rows}; sketch the tensors in two lists"
        )
    device = tensors[0].device if tensors else torch.device("cpu")
    if scales is not None:
        check_tensor(op, "scales", scales, (torch.float32,), ndim=1)
        if len(scales) != len(tensors):
            raise ValueError(
                f"{op}: scales must have one entry for each of the {len(tensors)} tensors, got {len(scales)}"
            )
        check_same_device(op, {"scales": scales, "tensors": tensors[0] if tensors else None})
        scales = scales.detach()
    run = find(op, backend, device)
    # Backends take a batch of lists in which something is to be sketched.
    listed = [x.detach() if batched else x.detach()[None] for x in tensors]
    batch = len(listed[0]) if listed else 1
    if any(x.numel() for x in listed):
        sketch, lengths = run(listed, dim, seed=seed, scales=scales, squares=squares)
    else:
        sketch, lengths = nothing(batch, dim, device=device), nothing(batch, len(listed), device=device)
    if not batched:
        sketch, lengths = sketch[0], lengths[0] if squares else None
    return (sketch.float(), lengths.float()) if squares else sketch.float()
