"""The bases that are learned from a sample: a mean, a shared basis of all layers, and a basis for each layer.

Bases are evaluated by two-fold cross-fitting: the sample is cut in two halves, and each is scored with the
basis fitted on the other half. One block of all examples is held in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import ops

_TINY = 1e-30


@dataclass(frozen=True)
class LearnedBasis:
    """The mean and principal directions of a sample's unit blocks, with their energies on unseen examples.

    mean: [blocks, width]; shared: [blocks * width, r], orthonormal columns for the whole vector, by falling
    energy; per_layer: [width, p] for each block, orthonormal columns for what the shared basis leaves;
    per_layer_energy: [p] for each block, the mean square of coordinates in it; residual_energy: [blocks], the
    energy outside both; cross_fitted: maps a block to [m, width], what a shared basis that was fitted without
    an example leaves of it; explained: [m], the share of an example's energy about the mean that such a basis
    explains. Energies are those of examples that the basis was not fitted on.
    """

    mean: Tensor
    shared: Tensor
    per_layer: list[Tensor]
    per_layer_energy: list[Tensor]
    residual_energy: Tensor
    cross_fitted: Callable[[int], Tensor]
    explained: Tensor

    def cpu(self) -> LearnedBasis:
        """The same on the CPU; `cross_fitted` still computes on the device, and returns CPU tensors."""
        return LearnedBasis(
            self.mean.cpu(),
            self.shared.cpu(),
            [axes.cpu() for axes in self.per_layer],
            [energy.cpu() for energy in self.per_layer_energy],
            self.residual_energy.cpu(),
            lambda b: self.cross_fitted(b).cpu(),
            self.explained.cpu(),
        )

    def unexplained(self) -> dict[str, float]:
        """The mean and the 99th percentile of the share of an unseen example's energy about the mean that
        lies outside the shared basis, as the manifest stores them."""
        share = 1 - self.explained
        return {"unexplained_mean": float(share.mean()), "unexplained_p99": float(share.quantile(0.99))}


def principal_directions(x: Tensor, r: int) -> Tensor:
    """The r directions that carry most energy of the rows of [m, D], each of length 1 at most: [D, r'].

    r' < r if the rows span fewer.
    """
    wide = x.shape[1] > x.shape[0]
    values, vectors = _largest_eigenpairs(
        (ops.matmul(x, x.T) if wide else ops.matmul(x.T, x)).double(), r, len(x)
    )
    return ops.matmul(x.T, (vectors / values.sqrt()).float()).contiguous() if wide else vectors.float()


def _largest_eigenpairs(gram: Tensor, r: int, energy: float) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues and their vectors, without those that are rounding errors of `energy`."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    r = min(r, int((values > 1e-6 * energy).sum()))
    return values[:r], vectors[:, :r]


class _SharedBasis:
    """The mean and the principal directions of all blocks of some examples together."""

    def __init__(self, sample: Tensor, rows: Tensor, r: int) -> None:
        _, blocks, width = sample.shape
        self.mean = torch.empty(blocks, width, device=sample.device)
        gram = torch.zeros(len(rows), len(rows), device=sample.device)
        for b in range(blocks):
            x = sample[rows, b].float()
            self.mean[b] = x.mean(0)
            x = x - self.mean[b]
            gram += ops.matmul(x, x.T)
        values, vectors = _largest_eigenpairs(gram.double(), r, len(rows) * blocks)
        scaled = (vectors / values.sqrt()).float()
        self.directions = torch.empty(blocks, width, scaled.shape[1], device=sample.device)
        for b in range(blocks):
            self.directions[b] = ops.matmul((sample[rows, b].float() - self.mean[b]).T, scaled)

    def project(self, sample: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of these examples about the mean, [n, r], and their squared lengths, [n]."""
        coordinates = self.mean.new_zeros(len(rows), self.directions.shape[2])
        square = self.mean.new_zeros(len(rows))
        for b in range(sample.shape[1]):
            x = sample[rows, b].float() - self.mean[b]
            coordinates += ops.matmul(x, self.directions[b])
            square += x.square().sum(1)
        return coordinates, square


def learning_bytes(sample: Tensor, shared: int) -> int:
    """About the most bytes of a GPU that `learn_basis` takes with a sample on it, the sample included."""
    m, blocks, width = sample.shape
    directions = 4 * blocks * width * (3 * min(m, shared) + min(width, m // 2))
    one_block = 8 * 4 * m * width + 8 * 6 * min(m, width) ** 2  # float32 copies; float64 for eigenvectors
    return sample.nbytes + directions + one_block + (256 << 20)  # and the libraries' own


def learn_basis(sample: Tensor, shared: int) -> LearnedBasis:
    """Learn bases from unit blocks [m, blocks, width], float16 or float32, on the device of the sample.

    shared: the most directions of the shared basis.
    """
    m, blocks, width = sample.shape
    device = sample.device
    halves = (torch.arange(0, m, 2, device=device), torch.arange(1, m, 2, device=device))
    bases = [_SharedBasis(sample, rows, shared) for rows in halves[::-1]]  # each half's: of the other one
    explained, coordinates = torch.zeros(m, device=device), []
    for rows, basis in zip(halves, bases, strict=True):
        projected, square = basis.project(sample, rows)
        coordinates.append(projected)
        explained[rows] = projected.square().sum(1) / square.clamp(min=_TINY)

    def cross_fitted(b: int) -> Tensor:
        left = torch.empty(m, width, device=device)
        for rows, basis, projected in zip(halves, bases, coordinates, strict=True):
            left[rows] = sample[rows, b].float() - basis.mean[b] - projected @ basis.directions[b].T
        return left

    p = min(width, m // 2)
    per_layer, per_layer_energy = [], []
    residual_energy = torch.empty(blocks, device=device)
    for b in range(blocks):
        left, energy = cross_fitted(b), torch.zeros(p, device=device)
        for scored, fitted_on in (halves, halves[::-1]):
            directions = principal_directions(left[fitted_on], p)
            energy[: directions.shape[1]] += (left[scored] @ directions).square().mean(0) / 2
        per_layer.append(principal_directions(left, p))
        per_layer_energy.append(energy[: per_layer[-1].shape[1]])
        residual_energy[b] = (left.square().sum(1).mean() - per_layer_energy[-1].sum()).clamp(min=0)
    whole = _SharedBasis(sample, torch.arange(m, device=device), shared)
    return LearnedBasis(
        whole.mean,
        whole.directions.flatten(0, 1),
        per_layer,
        per_layer_energy,
        residual_energy,
        cross_fitted,
        explained,
    )
