"""TensorSketch of a matrix gradient: of the matrix, or of a linear layer's inputs and output gradients."""

from typing import Protocol

import torch
from torch import Tensor

from rapidin.ops.reference import sketch_hash as h


def matrix_sketch(grad: Tensor, dim: int, *, seed: int) -> Tensor:
    """grad: [..., O, I] -> [..., dim] float64: element (o, i) goes to bin (h_out(o) + h_in(i)) mod dim."""
    n_out, n_in = grad.shape[-2:]
    device = grad.device
    bins_out = h.bins(seed, h.OUT_BINS, n_out, dim).to(device)
    bins_in = h.bins(seed, h.IN_BINS, n_in, dim).to(device)
    signs_out = h.signs(seed, h.OUT_SIGNS, torch.arange(n_out)).to(device)
    signs_in = h.signs(seed, h.IN_SIGNS, torch.arange(n_in)).to(device)
    bins = ((bins_out[:, None] + bins_in) % dim).flatten()
    values = (grad.double() * signs_out[:, None] * signs_in).flatten(-2)
    return torch.zeros(*grad.shape[:-2], dim, dtype=torch.float64, device=device).index_add_(-1, bins, values)


def stack_sketch(grad: Tensor, dim: int, *, seed: int) -> Tensor:
    """grad: [..., E, O, I] -> [..., dim] float64: element (e, o, i) goes to bin (h_stack(e) + h_out(o) +
    h_in(i)) mod dim."""
    count = grad.shape[-3]
    shifts = h.bins(seed, h.STACK_BINS, count, dim).tolist()
    signs = h.signs(seed, h.STACK_SIGNS, torch.arange(count)).tolist()
    each = matrix_sketch(grad, dim, seed=seed)
    total = torch.zeros(*grad.shape[:-3], dim, dtype=torch.float64, device=grad.device)
    for e, (shift, sign) in enumerate(zip(shifts, signs, strict=True)):
        total += sign * each[..., e, :].roll(shift, -1)
    return total


class LowRank(Protocol):
    """I + basis diag(gain) basis^T; basis: [n, r], gain: [r]."""

    @property
    def basis(self) -> Tensor: ...
    @property
    def gain(self) -> Tensor: ...


def preconditioned(x: Tensor, low_rank: LowRank | None) -> Tensor:
    """x: [..., n] -> [..., n] float64"""
    x = x.double()
    if low_rank is None:
        return x
    basis, gain = low_rank.basis.double(), low_rank.gain.double()
    return x + ((x @ basis) * gain) @ basis.T


def linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
) -> Tensor:
    """inputs: [B, T, I], grads: [B, T, O] -> [B, dim] float64: matrix_sketch of sum_t grads_t inputs_t^T, of
    preconditioned factors where there is a LowRank."""
    inputs, grads = preconditioned(inputs, inputs_low_rank), preconditioned(grads, grads_low_rank)
    formed = [(g.T @ a) for a, g in zip(inputs, grads, strict=True)]
    if not formed:
        return torch.zeros(0, dim, dtype=torch.float64, device=inputs.device)
    return torch.stack([matrix_sketch(g, dim, seed=seed) for g in formed])


def embedding_sketch(
    ids: Tensor, grads: Tensor, dim: int, *, seed: int, vocabulary: int | None = None
) -> Tensor:
    """ids: [B, T] int64, grads: [B, T, E] -> [B, dim] float64: the embedding's [V, E] gradient's sketch."""
    rows = int(ids.max()) + 1 if ids.numel() else 0  # rows above are zero
    out = torch.zeros(len(ids), dim, dtype=torch.float64, device=grads.device)
    for b in range(len(ids)):
        formed = torch.zeros(rows, grads.shape[-1], dtype=torch.float64, device=grads.device)
        out[b] = matrix_sketch(formed.index_add_(0, ids[b], grads[b].double()), dim, seed=seed)
    return out
