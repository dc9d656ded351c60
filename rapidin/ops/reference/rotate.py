"""The rotation before packing as one matrix, and blocks of length 1; see rapidin.ops.rotate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin.ops.reference.sketch_hash import ROTATION, signs

if TYPE_CHECKING:
    from rapidin.ops.rotate import Cut


def rotate(x: Tensor, *, seed: int, inverse: bool, mean: Tensor | None, cut: Cut | None) -> Tensor:
    """-> [n, blocks, width] float32, or cut [n, kept]; see rapidin.ops.rotate."""
    blocks, width = x.shape[1:]
    y = x.double() if mean is None else x.double() - mean.double()
    flips = signs(seed, ROTATION, torch.arange(blocks * width, device=x.device)).view(blocks, width)
    hadamard = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while len(hadamard) < width:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    hadamard = hadamard / width**0.5
    y = (y @ hadamard) * flips if inverse else (y * flips) @ hadamard
    return (y if cut is None else cut.of(y)).float()


def unit_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> blocks of length 1 and their lengths, float32; see rapidin.ops.unit_blocks."""
    x = x.double()
    length = x.square().sum(-1).sqrt()
    return (x / length.where(length > 0, 1.0)[..., None]).float(), length.float()
