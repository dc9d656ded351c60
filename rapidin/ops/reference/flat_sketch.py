"""Flat sketch of a list of tensors: rows to groups, lanes permuted by XOR, a sign for each element."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rapidin.ops.reference import sketch_hash as h

ROW = 128
POOL = 16


def flat_sketch(
    tensors: Sequence[Tensor],
    dim: int,
    *,
    seed: int,
    scales: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """tensors: [B, ...] each, at least one -> [B, dim] float64 and, with squares, [B, n].

    scales: [n], each tensor's factor in the sketch, not in its squared length
    """
    width = ROW if dim % ROW == 0 else dim
    groups = dim // width
    pool = torch.stack([h.permutation(seed, h.FLAT_POOL, t * groups, groups) for t in range(POOL)])
    batch = len(tensors[0])
    out = torch.zeros(batch, dim, dtype=torch.float64, device=tensors[0].device)
    lengths = torch.zeros(batch, len(tensors), dtype=torch.float64, device=out.device)
    first_row = 0
    for n, x in enumerate(tensors):
        values = x.reshape(batch, x[:1].numel()).double()
        lengths[:, n] = values.square().sum(1)
        if scales is not None:
            values = values * scales[n].double()
        element = torch.arange(values.shape[1])
        row, e = first_row + element // width, element % width

        chunk, position = row // groups, row % groups
        permutation = h.words(seed, h.FLAT_TURN, chunk) % POOL
        group = (pool[permutation, position] + h.words(seed, h.FLAT_ROTATION, chunk) % groups) % groups
        lane = e ^ (h.words(seed, h.FLAT_LANE, row) & (width - 1))

        sign_words = torch.zeros_like(row)
        for j in range((width + 31) // 32):
            sign_words = torch.where(e // 32 == j, h.words(seed, h.FLAT_SIGNS + j, row), sign_words)
        signs = 1.0 - 2.0 * (sign_words >> (e % 32) & 1).double()

        out.index_add_(1, (group * width + lane).to(x.device), values * signs.to(x.device))
        first_row += -(-values.shape[1] // width)
    return out, lengths if squares else None
