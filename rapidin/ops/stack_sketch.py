"""stack_sketch: the sketch of a stack of matrices, from the sketches of some of them."""

import torch
from torch import Tensor

from rapidin.ops import tables
from rapidin.ops.checks import check_sketch


def stack_sketch(
    sketches: Tensor, matrices: Tensor, owners: Tensor, *, seed: int, count: int, examples: int
) -> Tensor:
    """Sums sketches of single matrices to those of stacks [count, O, I]: each is shifted and signed by the
    hash of its matrix.

    sketches: [P, dim] float32, of matrices[p] of the stack of example owners[p], all with this seed;
    matrices, owners: [P] int64
    -> [examples, dim] float32: the sketch of each example's stack, in which the other matrices are zero
    """
    dim = sketches.shape[1]
    check_sketch("stack_sketch", dim, seed)
    table = tables.rows(seed, tables.STACK, count, dim, sketches.device)[matrices]
    shift = (table & 0x7FFFFFFF).long()
    places = (torch.arange(dim, device=sketches.device) - shift[:, None]) % dim
    shifted = sketches.float().gather(1, places)
    shifted = torch.where((table < 0)[:, None], -shifted, shifted)
    return add_at(torch.zeros(examples, dim, device=sketches.device), owners, shifted)


def add_at(total: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Adds rows x [P, ...] to total[index], in an order that depends on nothing else; returns `total`."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, x)
    return total.index_put_((index,), x, accumulate=True)
