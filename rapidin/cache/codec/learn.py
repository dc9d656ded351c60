"""What a code learns from a sample: a mean, the directions in which all layers vary together, and in which
each varies.

What is learnt is judged on examples that it was not learnt from: the sample is cut in two halves, and each is
seen with the other's eyes. One block of all examples is held in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Learnt:
    """What is known of the blocks.

    mean: [blocks, width]; head: [blocks * width, r], orthonormal columns, of the whole vector, most energy
    first; tail: for each block [width, p], orthonormal columns of what the head leaves; energy: for each
    block [p], the mean square along them on unseen examples; rest: [blocks], what neither head nor tail
    holds, a block, on unseen examples; unseen: gives, for a block, [m, width], what the head leaves of each
    example where it was learnt without that example; held: [m], the share of an example's energy about the
    mean that the head then holds.
    """

    mean: Tensor
    head: Tensor
    tail: list[Tensor]
    energy: list[Tensor]
    rest: Tensor
    unseen: Callable[[int], Tensor]
    held: Tensor

    def cpu(self) -> Learnt:
        """The same on the CPU, but for `unseen`, which works where it did and gives what is on the CPU."""
        return Learnt(
            self.mean.cpu(),
            self.head.cpu(),
            [axes.cpu() for axes in self.tail],
            [energy.cpu() for energy in self.energy],
            self.rest.cpu(),
            lambda b: self.unseen(b).cpu(),
            self.held.cpu(),
        )

    def outside(self) -> dict[str, float]:
        """Shares of an unseen example's energy about the mean that the head does not hold: the mean, and what
        one example in a hundred exceeds."""
        share = 1 - self.held
        return {"outside_mean": float(share.mean()), "outside_99": float(share.quantile(0.99))}


def principal(x: Tensor, r: int) -> Tensor:
    """The r directions that carry most of the rows of [m, D], each of length 1 at most: [D, r'].

    r' <= r where the rows span fewer.
    """
    wide = x.shape[1] > x.shape[0]
    values, vectors = _largest((x @ x.T if wide else x.T @ x).double(), r, len(x))
    return (x.T @ (vectors / values.sqrt()).float()).contiguous() if wide else vectors.float()


def _largest(gram: Tensor, r: int, energy: float) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues and their vectors, those that are rounding of so much energy left out."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    r = min(r, int((values > 1e-6 * energy).sum()))
    return values[:r], vectors[:, :r]


class _Head:
    """The directions in which all blocks of some examples vary together."""

    def __init__(self, sample: Tensor, rows: Tensor, r: int) -> None:
        _, blocks, width = sample.shape
        self.mean = torch.empty(blocks, width, device=sample.device)
        gram = torch.zeros(len(rows), len(rows), device=sample.device)
        for b in range(blocks):
            x = sample[rows, b].float()
            self.mean[b] = x.mean(0)
            gram += (x - self.mean[b]) @ (x - self.mean[b]).T
        values, vectors = _largest(gram.double(), r, len(rows) * blocks)
        scaled = (vectors / values.sqrt()).float()
        self.directions = torch.empty(blocks, width, scaled.shape[1], device=sample.device)
        for b in range(blocks):
            self.directions[b] = (sample[rows, b].float() - self.mean[b]).T @ scaled

    def along(self, sample: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """These examples about the mean: [n, r] along the directions, and their squared lengths [n]."""
        found = self.mean.new_zeros(len(rows), self.directions.shape[2])
        square = self.mean.new_zeros(len(rows))
        for b in range(sample.shape[1]):
            x = sample[rows, b].float() - self.mean[b]
            found += x @ self.directions[b]
            square += x.square().sum(1)
        return found, square


def learning_bytes(sample: Tensor, head: int) -> int:
    """About the most bytes of a GPU that `learn` takes with a sample on it, the sample counted in."""
    m, blocks, width = sample.shape
    directions = 4 * blocks * width * (3 * min(m, head) + min(width, m // 2))
    one_block = 8 * 4 * m * width + 8 * 6 * min(m, width) ** 2  # float32 copies; float64 for eigenvectors
    return sample.nbytes + directions + one_block + (256 << 20)  # and the libraries' own


def learn(sample: Tensor, head: int) -> Learnt:
    """Learn from unit blocks [m, blocks, width], float16 or float32; head: how many joint directions, at
    most. What is learnt is on the sample's device."""
    m, blocks, width = sample.shape
    device = sample.device
    halves = (torch.arange(0, m, 2, device=device), torch.arange(1, m, 2, device=device))
    eyes = [_Head(sample, rows, head) for rows in halves[::-1]]  # each half's: learnt from the other
    held, along = torch.zeros(m, device=device), []
    for rows, eye in zip(halves, eyes, strict=True):
        found, square = eye.along(sample, rows)
        along.append(found)
        held[rows] = found.square().sum(1) / square.clamp(min=_TINY)

    def unseen(b: int) -> Tensor:
        left = torch.empty(m, width, device=device)
        for rows, eye, found in zip(halves, eyes, along, strict=True):
            left[rows] = sample[rows, b].float() - eye.mean[b] - found @ eye.directions[b].T
        return left

    p = min(width, m // 2)
    tail, energy, rest = [], [], torch.empty(blocks, device=device)
    for b in range(blocks):
        left, carried = unseen(b), torch.zeros(p, device=device)
        for own, other in (halves, halves[::-1]):
            seen = principal(left[other], p)
            carried[: seen.shape[1]] += (left[own] @ seen).square().mean(0) / 2
        tail.append(principal(left, p))
        energy.append(carried[: tail[-1].shape[1]])
        rest[b] = (left.square().sum(1).mean() - energy[-1].sum()).clamp(min=0)
    final = _Head(sample, torch.arange(m, device=device), head)
    return Learnt(final.mean, final.directions.flatten(0, 1), tail, energy, rest, unseen, held)
