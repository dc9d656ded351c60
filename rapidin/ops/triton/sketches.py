"""linear_sketch, flat_sketch, matrix_sketch and embedding_sketch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.kernels import flat_sketch as flat_kernels
from rapidin.kernels import fourier_sketch as fourier_kernels
from rapidin.kernels import linear_sketch as linear_kernels
from rapidin.kernels.fold import fold
from rapidin.ops import tables
from rapidin.ops.flat_plan import flat_plan
from rapidin.ops.low_rank import LowRank, preconditioned

_TOKEN_BYTES = 256 << 20  # of tokens' spectra held at a time, where the kernel has not the width


def linear_sketch(
    inputs: Tensor,
    grads: Tensor,
    dim: int,
    *,
    seed: int,
    inputs_low_rank: LowRank | None = None,
    grads_low_rank: LowRank | None = None,
    blocks: int = linear_kernels.BLOCKS,
) -> Tensor:
    inputs, grads = preconditioned(inputs, inputs_low_rank), preconditioned(grads, grads_low_rank)
    table_in = tables.columns(seed, tables.IN, inputs.shape[2], dim, inputs.device)
    table_out = tables.columns(seed, tables.OUT, grads.shape[2], dim, inputs.device)
    # The planes' kernel takes 512 in bfloat16 alone: other dtypes would need more shared memory than most
    # GPUs have.
    planes = dim in linear_kernels.DIMS and (dim < 512 or inputs.dtype == grads.dtype == torch.bfloat16)
    if dim in fourier_kernels.DIMS and not planes:
        return fourier_kernels.fourier_sketch(inputs, grads, dim, table_in, table_out)
    if planes:
        return linear_kernels.linear_sketch(inputs, grads, dim, table_in, table_out, blocks)
    return by_torch_fft(inputs, grads, dim, table_in, table_out)


def by_torch_fft(inputs: Tensor, grads: Tensor, k: int, table_in: Tensor, table_out: Tensor) -> Tensor:
    """The sketch for any width, in torch: the sum of FFT(cs(a)) FFT(cs(g)) over tokens, transformed back."""
    batch, tokens = inputs.shape[:2]
    total = torch.zeros(batch, k // 2 + 1, dtype=torch.complex64, device=inputs.device)
    step = max(1, _TOKEN_BYTES // (16 * k * batch))
    for first in range(0, tokens, step):
        a = torch.fft.rfft(_count_sketch(inputs[:, first : first + step], table_in, k))
        total += (a * torch.fft.rfft(_count_sketch(grads[:, first : first + step], table_out, k))).sum(1)
    out: Tensor = torch.fft.irfft(total, n=k)
    return out


def _count_sketch(x: Tensor, table: Tensor, k: int) -> Tensor:
    """[B, T, n] -> [B, T, k] float32"""
    entries = table.view(-1, k)
    index = (entries & 0x7FFFFFFF).long()
    sign = torch.where(entries < 0, -1.0, 1.0)
    out = torch.zeros(*x.shape[:2], k, device=x.device, dtype=torch.float32)
    for chunk in range(len(entries)):
        piece = x[:, :, chunk * k : (chunk + 1) * k].float()
        if piece.shape[2] < k:
            piece = torch.nn.functional.pad(piece, (0, k - piece.shape[2]))
        out += piece[:, :, index[chunk]] * sign[chunk]
    return out


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    scales: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    plan = flat_plan(tensors, dim)
    permutations = tables.inverse_permutations(seed, plan.groups, tensors[0].device)
    scales = scales.contiguous() if scales is not None else None
    return flat_kernels.flat_sketch(plan, permutations, seed, scales, squares)


def matrix_sketch(grad: Tensor, dim: int, *, seed: int) -> Tensor:
    *leading, n_out, n_in = grad.shape
    matrices = grad.reshape(-1, n_out, n_in)
    sides = (tables.OUT, tables.IN)
    if n_out > n_in:  # columns are gathered in whole chunks: they are the longer side, of a bias the first
        matrices, sides = matrices.transpose(1, 2), (tables.IN, tables.OUT)
    rows, cols = matrices.shape[1:]
    row_table = tables.rows(seed, sides[0], rows, dim, grad.device)
    column_table = tables.columns(seed, sides[1], cols, dim, grad.device)
    return fold(matrices, row_table, column_table, dim).reshape(*leading, dim)


def embedding_sketch(ids: Tensor, grads: Tensor, dim: int, *, seed: int, vocabulary: int) -> Tensor:
    rows = 1 << (vocabulary - 1).bit_length()  # rounded up, so that few tables serve all batches
    row_table = tables.rows(seed, tables.OUT, rows, dim, grads.device)[ids]
    return fold(grads, row_table, tables.columns(seed, tables.IN, grads.shape[-1], dim, grads.device), dim)
