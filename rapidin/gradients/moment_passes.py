"""The passes that gather second moments of gradients, for preconditioners."""

from __future__ import annotations

import torch
from torch import Tensor

from rapidin import ops
from rapidin.gradients.batch import Batch
from rapidin.gradients.kfac import FactorMoments
from rapidin.gradients.passes import GradientPass, SketchTargets
from rapidin.gradients.rows import RowFactors, RowGroup
from rapidin.gradients.scale import Factors
from rapidin.gradients.squares import (
    Squares,
    as_factors,
    embedding_squares,
    factor_squares,
    formed_squares,
    joined,
)


class MomentPass(GradientPass):
    """Adds each gradient, as it is, to the second moments of the factors."""

    def __init__(self, sketched: SketchTargets, batch: Batch, moments: FactorMoments) -> None:
        super().__init__(sketched, batch)
        self._moments = moments

    def add_factors(self, n: int, factors: Factors) -> None:
        self._moments.add_factors(n, *factors.applied())

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._moments.add_embedding(n, ids, grad)

    def add_formed(self, n: int, grad: Tensor) -> None:
        self._moments.add_formed(n, grad.flatten(0, -3))

    def add_rows(self, n: int, factors: RowFactors) -> None:
        if factors.columns is None:
            super().add_rows(n, factors)
        else:  # moments are sums over rows of any order
            self._moments.add_factors(n, factors.columns[None], factors.rows[None])

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        self._moments.add_factors(n, *factors.applied())


class SquaresPass(GradientPass):
    """Sums the squares of each gradient's rows and columns, of the gradient as it is.

    Squares are taken of a parameter's whole gradient, so the contribution of each of its uses is held until
    the last one has arrived; with a single use that is at once.
    """

    def __init__(self, sketched: SketchTargets, batch: Batch) -> None:
        super().__init__(sketched, batch)
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._embedded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._formed: dict[int, Tensor] = {}
        self._squares: dict[int, Squares] = {}

    def finish(self) -> list[Squares]:
        """(row sums [B, O], column sums [B, I]) of each target, float64; zeros if no gradient arrived."""
        for n in {*self._factors, *self._embedded, *self._formed}:
            self._square(n)  # a call whose output took no part in the loss brought nothing
        zero = torch.zeros(self.rows, 1, dtype=torch.float64, device=self.device)
        shapes = [target.matrix for target in self.targets]
        return [
            self._squares.get(n, (zero.expand(-1, o), zero.expand(-1, i))) for n, (o, i) in enumerate(shapes)
        ]

    def add_factors(self, n: int, factors: Factors) -> None:
        self._factors.setdefault(n, []).append(factors.applied())
        self._call_done(n)

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        # Sums over the matrices of a stack, each of which comes whole.
        squares = factor_squares(*factors.applied())
        known = self._squares.get(n)
        sums = [torch.zeros(self.rows, x.shape[1], dtype=x.dtype, device=x.device) for x in squares]
        for total, x in zip(known or sums, squares, strict=True):
            ops.add_at(total, group.examples, x)
        self._squares[n] = known or (sums[0], sums[1])

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        self._embedded.setdefault(n, []).append((ids, grad))
        self._call_done(n)

    def add_formed(self, n: int, grad: Tensor) -> None:
        if self.targets[n].stack:
            r, c = formed_squares(grad.flatten(0, 1))
            self._squares[n] = r.view(*grad.shape[:2], -1).sum(1), c.view(*grad.shape[:2], -1).sum(1)
            return
        self._formed[n] = self._formed[n] + grad if n in self._formed else grad
        self._call_done(n)

    def _call_done(self, n: int) -> None:
        self.calls[n] -= 1
        if self.calls[n] <= 0:
            self._square(n)

    def _square(self, n: int) -> None:
        """Square what has arrived of a target's gradient, and let go of it."""
        factors, embedded = self._factors.pop(n, []), self._embedded.pop(n, [])
        formed = self._formed.pop(n, None)
        vocabulary = self.targets[n].shape[0] if embedded else 0
        if embedded and not factors and formed is None:
            self._squares[n] = embedding_squares(*joined(embedded), vocabulary)
            return
        factors += [as_factors(ids, grad, vocabulary) for ids, grad in embedded]
        if formed is None:
            self._squares[n] = factor_squares(*joined(factors))
            return
        if factors:
            columns, outputs = joined(factors)
            formed = formed + torch.bmm(outputs.float().mT, columns.float())
        self._squares[n] = formed_squares(formed)
