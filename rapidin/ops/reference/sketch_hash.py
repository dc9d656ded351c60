"""The keyed hash: words, signs and permutations from (seed, stream, index)."""

import torch
from torch import Tensor

OUT_BINS, OUT_SIGNS, IN_BINS, IN_SIGNS = 0, 1, 2, 3
STACK_BINS, STACK_SIGNS = 4, 5
FLAT_POOL, FLAT_TURN, FLAT_ROTATION, FLAT_LANE, FLAT_SIGNS = 8, 9, 10, 11, 12
ROTATION = 16

_MASK = 0xFFFFFFFF


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words ("lowbias32"); x: int64 holding values in [0, 2**32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK  # an int64 product wraps mod 2**64: its low 32 bits are right
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def words(seed: int, stream: int, index: Tensor) -> Tensor:
    """index: int64 (any shape), taken mod 2**32 -> the 32-bit words as int64, same shape."""
    s0, s1 = seed & _MASK, seed >> 32
    a = int(mix32(torch.tensor((s0 + 0x9E3779B9 * (2 * stream + 1)) & _MASK, device="cpu")))
    b = int(mix32(torch.tensor(((s1 ^ a) + 0x85EBCA6B) & _MASK, device="cpu")))
    return mix32((mix32((index & _MASK) ^ a) + b) & _MASK)


def signs(seed: int, stream: int, index: Tensor) -> Tensor:
    """index: int64 -> float64 of the same shape, -1 where the top bit of the word is set, else 1."""
    return 1.0 - 2.0 * (words(seed, stream, index) >> 31).double()


def permutation(seed: int, stream: int, first: int, n: int) -> Tensor:
    """-> [n] int64: the rank of word p among the words of first .. first + n - 1; ties by smaller p."""
    order = torch.sort(words(seed, stream, first + torch.arange(n)), stable=True).indices
    ranks = torch.empty(n, dtype=torch.int64)
    ranks[order] = torch.arange(n)
    return ranks


def bins(seed: int, stream: int, n: int, k: int) -> Tensor:
    """-> [n] int64 in [0, k): each chunk of k neighbouring indices has a permutation of the k bins."""
    chunks = [permutation(seed, stream, start, k) for start in range(0, n, k)]
    return torch.cat(chunks)[:n] if chunks else torch.empty(0, dtype=torch.int64)
