"""linear_sketch and embedding_sketch: a layer's gradient sketched from its factors, no matrix formed."""

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_same_device, check_sketch, check_tensor, nothing
from rapidin.ops.low_rank import LowRank


def linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketches each example's gradient of a linear layer's weight, sum_t grads[b, t] inputs[b, t]^T.

    inputs: [B, T, I], grads: [B, T, O], float32, float16 or bfloat16, any strides
    inputs_low_rank, grads_low_rank: a preconditioner of each side, of I and of O features: the side's x is
    replaced by ``x + ((x @ basis) * gain) @ basis.T``, in float32; on a GPU the sum of a bfloat16 x
    may be rounded to bfloat16
    -> [B, dim] float32: what matrix_sketch gives for the formed [O, I] gradients, up to rounding

    On a GPU with dim up to 512, two bfloat16 sides are rounded to bfloat16 once more before they are
    multiplied: a relative error of about 0.002 in a sketch (docs/reference/kernels.md). NaN or infinite
    values of an example make its sketch not finite; which of its numbers is not defined.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    op = "linear_sketch"
    check_sketch(op, dim, seed)
    check_tensor(op, "inputs", inputs, SKETCHED, ndim=3)
    check_tensor(op, "grads", grads, SKETCHED, ndim=3)
    _check_tokens(op, "inputs", inputs, grads)
    named: dict[str, Tensor | None] = {"inputs": inputs, "grads": grads}
    for name, low_rank, x in (("inputs", inputs_low_rank, inputs), ("grads", grads_low_rank, grads)):
        if low_rank is not None:
            named[f"{name}_low_rank"] = _checked_basis(op, f"{name}_low_rank", low_rank, name, x)
    device = check_same_device(op, named)
    low_ranks = [
        None if each is None or not each.rank else each for each in (inputs_low_rank, grads_low_rank)
    ]
    run = find(op, backend, device, inputs, grads, dim, *low_ranks)
    if not inputs.numel() or not grads.numel():
        return nothing(len(inputs), dim, device=device)
    result: Tensor = run(
        inputs.detach(),
        grads.detach(),
        dim,
        seed=seed,
        inputs_low_rank=low_ranks[0],
        grads_low_rank=low_ranks[1],
    )
    return result.float()


def embedding_sketch(
    ids: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    vocabulary: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketches each example's gradient of an embedding's weight [V, E]: row ids[b, t] gets grads[b, t].

    ids: [B, T] int64, none negative; grads: [B, T, E] float32, float16 or bfloat16, zero where padded
    vocabulary: V, if known: the ids are then not checked, which would wait for a GPU; with an id of V or
        more, the sketch is undefined
    -> [B, dim] float32: what matrix_sketch gives for the formed [V, E] gradients, up to rounding

    Raises TypeError or ValueError on arguments that are not as above.
    """
    op = "embedding_sketch"
    check_sketch(op, dim, seed)
    check_tensor(op, "ids", ids, (torch.int64,), ndim=2)
    check_tensor(op, "grads", grads, SKETCHED, ndim=3)
    _check_tokens(op, "ids", ids, grads)
    if vocabulary is not None and not 1 <= vocabulary <= 2**31:
        raise ValueError(f"{op}: vocabulary must be from 1 to 2**31, got {vocabulary}")
    if vocabulary is None and ids.numel():
        least, largest = int(ids.min()), int(ids.max())
        if least < 0 or largest >= 2**31:
            raise ValueError(
                f"{op}: ids must be at least 0 and below 2**31, got {least} to {largest}; "
                "give padded positions any valid id and zero grads"
            )
        vocabulary = largest + 1
    device = check_same_device(op, {"ids": ids, "grads": grads})
    run = find(op, backend, device)
    if not grads.numel():
        return nothing(len(ids), dim, device=device)
    result: Tensor = run(ids, grads.detach(), dim, seed=seed, vocabulary=vocabulary)
    return result.float()


def _checked_basis(op: str, name: str, low_rank: LowRank, side: str, x: Tensor) -> Tensor:
    if not isinstance(low_rank, LowRank):
        raise TypeError(f"{op}: {name} must be a rapidin.ops.LowRank, got {type(low_rank).__name__}")
    if low_rank.features != x.shape[2]:
        raise ValueError(
            f"{op}: {name} must have a row for each feature of {side}, got {low_rank.features} rows "
            f"for shape {tuple(x.shape)}"
        )
    return low_rank.basis


def _check_tokens(op: str, name: str, x: Tensor, grads: Tensor) -> None:
    if x.shape[:2] != grads.shape[:2]:
        raise ValueError(
            f"{op}: {name} and grads must have the same batch and tokens (axes 0 and 1), "
            f"got shapes {tuple(x.shape)} and {tuple(grads.shape)}"
        )
