"""Scores from inner products: every method on one small set of Gram matrices.

A block is a matrix of the model at one point; of its training rows y_n and test rows q only inner products
are needed, so gradients of any size, sketches and decoded rows are all scored by the same few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.attribution.normalization import row_factors
from rapidin.cache.codec.plan import typical_length

NORMALIZE = ("none", "layer", "cosine")


@dataclass(frozen=True)
class Grams:
    """Inner products, float64. train: [blocks, n, n]; cross: [blocks, test, n]; lengths: [blocks, test] of
    the test rows; true: [blocks, n] of the training rows, where what is given of them is noisy."""

    train: Tensor
    cross: Tensor
    lengths: Tensor
    true: Tensor

    @staticmethod
    def of(train: Sequence[Tensor], test: Sequence[Tensor], true: Tensor | None = None) -> Grams:
        """From rows [n, numbers] and [test, numbers] of each block; true: see above, their own lengths where
        it is not given."""
        kernel = torch.stack([(x @ x.T).double() for x in train])
        cross = torch.stack([(q @ x.T).double() for x, q in zip(train, test, strict=True)])
        lengths = torch.stack([q.norm(dim=1).double() for q in test])
        own = kernel.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        return Grams(kernel, cross, lengths, own if true is None else true.double())

    @staticmethod
    def cat(grams: Sequence[Grams]) -> Grams:
        """The blocks of several points together."""
        fields = ("train", "cross", "lengths", "true")
        return Grams(*(torch.cat([getattr(g, field) for g in grams]) for field in fields))

    def normalized(self, how: str) -> Grams:
        """Blocks of length 1 ("layer"), all blocks together of length 1 ("cosine"), or as is ("none").

        "weighted": blocks of training rows at length 1 times the fourth root of their geometric mean, and
        lengths of test rows' blocks that add up to 1.
        """
        if how == "none":
            return self
        rows, queries = self.true, self.lengths
        if how == "cosine":
            rows, queries = (x.norm(dim=0, keepdim=True).expand_as(x) for x in (rows, queries))
        if how == "weighted":
            queries = queries.sum(0, keepdim=True).expand_as(queries)
        rows, queries = (torch.where(x > 0, 1 / x, 0.0) for x in (rows, queries))
        if how == "weighted":
            rows = rows * row_factors(typical_length(self.true.T)).T
        return Grams(
            self.train * rows[:, :, None] * rows[:, None, :],
            self.cross * queries[:, :, None] * rows[:, None, :],
            self.lengths * queries,
            self.true * rows,
        )

    def mean_square(self) -> Tensor:
        """Mean squared length of the training rows: [blocks]."""
        return self.true.square().mean(1)


def dot(grams: Grams) -> Tensor:
    """Sum over the blocks of inner products: [test, n]."""
    return grams.cross.sum(0)


def datainf(grams: Grams, damping: Tensor) -> Tensor:
    """DataInf's closed form (Kwon et al., ICLR 2024, eq. 5): [test, n].

    sum_b 1/l_b (<q, y_j> - 1/n sum_i <q, y_i> <y_i, y_j> / (l_b + |y_i|^2)), damping: l_b, [blocks].
    """
    weights = grams.cross / (damping[:, None] + grams.true.square())[:, None, :]
    preconditioned = grams.cross - weights @ grams.train / grams.train.shape[1]
    return (preconditioned / damping[:, None, None]).sum(0)


def mean_eigenvalue(grams: Grams, kind: str) -> Tensor:
    """What damping is counted in, of each block's second moment: [blocks].

    "count": trace / n, the mean of its n eigenvalues that are not zero, where n is less than the width.
    "energy": sum of the squares of the eigenvalues / trace, their mean weighted by themselves; the trace over
    the effective rank, as that is trace^2 / sum of squares. A row's product with itself counts by its true
    length: what a codec adds to it is no energy of the data.
    """
    n = grams.train.shape[1]
    if kind == "count":
        return grams.train.diagonal(dim1=1, dim2=2).mean(1) / n
    own = grams.train.diagonal(dim1=1, dim2=2).square().sum(1)
    squares = grams.train.square().sum((1, 2)) - own + grams.true.pow(4).sum(1)
    return squares / n / grams.true.square().sum(1).clamp(min=1e-300)


def fisher(grams: Grams, damping: float, kind: str = "energy", left_out: bool = False) -> Tensor:
    """Products under the inverse of (F + damping x mean eigenvalue), F the second moment of the block's n
    training rows, the sum over the blocks: [test, n].

    F is far too large to form, but by the Woodbury identity Y (F + d)^-1 = (K / n + d)^-1 Y, where K is the
    Gram matrix of the rows Y. left_out: each row is scored by the moment of the n - 1 others, which by the
    Sherman-Morrison formula divides its score by 1 - h, h = y (F + d)^-1 y / n, its own leverage. Then what a
    codec adds to a row's own length does not make its score smaller.
    """
    n = grams.train.shape[1]
    added = damping * mean_eigenvalue(grams, kind)
    inverse = torch.linalg.inv(grams.train / n + added[:, None, None] * torch.eye(n, dtype=torch.float64))
    preconditioned = grams.cross @ inverse
    if left_out:  # 1 - h is d times the inverse's diagonal
        preconditioned = preconditioned / (added[:, None] * inverse.diagonal(dim1=1, dim2=2))[:, None, :]
    return preconditioned.sum(0)
