"""The random orthogonal turn: signs, then a fast Hadamard transform, so that no number of a block stands out.

After it the numbers of a block look like Gaussian noise whatever the block was, which is what makes one bit a
number and one scale a row enough (RaBitQ, Gao & Long, SIGMOD 2024, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rapidin import _cpu

_STREAM = 16  # of the keyed hash in docs/sketch.md; the sketches use the streams below


def turn(x: Tensor, seed: int) -> Tensor:
    """Each block turned by an orthogonal matrix of its own: [n, blocks, width] -> the same, float32.

    width: a power of two. The turn depends on the seed, the block's number and the width alone.
    """
    return _hadamard(x * _signs(x.shape[1], x.shape[2], seed))


def turn_back(x: Tensor, seed: int) -> Tensor:
    """The inverse of `turn`."""
    return _hadamard(x) * _signs(x.shape[1], x.shape[2], seed)


def _signs(blocks: int, width: int, seed: int) -> Tensor:
    words = torch.empty(blocks * width, dtype=torch.int32)
    _cpu.hash_words(seed, _STREAM, 0, len(words), words.data_ptr())
    return torch.where(words < 0, -1.0, 1.0).view(blocks, width)


def _hadamard(x: Tensor) -> Tensor:
    """The normalised Hadamard transform of the last axis: its own inverse."""
    shape, width = x.shape, x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"the width must be a power of two, got {width}")
    x = x.reshape(-1, width) / math.sqrt(width)
    half = 1
    while half < width:
        pairs = x.view(len(x), -1, 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(-1, width)
        half *= 2
    return x.view(shape)
