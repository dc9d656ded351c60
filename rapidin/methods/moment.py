"""Second moments of a cache's rows, block by block: ``M_b = sum_n w_nb y_nb y_nb^T``.

Kept as a matrix [width, width], or, where there are fewer rows than that, as the rows themselves: the same
products by the Woodbury identity, in less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.cache import Cache
from rapidin.methods.vectors import count, row_scales, vectors_of

# Weights [n, blocks] of rows from their squared lengths [n, blocks], both float64.
Weights = Callable[[Tensor], Tensor]


@dataclass
class Moment:
    """M_b of some blocks. n: rows it was made of; matrix: [blocks, width, width] float32 or None; rows: [n,
    blocks, width] float32 or None; trace: [blocks] float64, all of them of rows divided by `size` [blocks],
    the root mean square length of a row, so that tiny gradients stay in float32's range."""

    n: int
    size: Tensor
    trace: Tensor
    matrix: Tensor | None
    rows: Tensor | None

    @property
    def square(self) -> Tensor:
        """trace(M_b^2) of the divided rows: [blocks] float64."""
        if self.matrix is not None:
            return self.matrix.double().square().sum((1, 2))
        assert self.rows is not None
        by_block = self.rows.transpose(0, 1)
        return torch.stack([(rows @ rows.T).double().square().sum() for rows in by_block])

    def times(self, v: Tensor) -> Tensor:
        """M_b v_b, of v [m, blocks, width]: the same shape, float64."""
        v = v.double() * self.size[:, None] ** 2
        if self.matrix is not None:
            return torch.einsum("mbk,bkl->mbl", v, self.matrix.double())
        assert self.rows is not None
        rows = self.rows.double()
        return torch.einsum("mbn,nbk->mbk", torch.einsum("mbk,nbk->mbn", v, rows), rows)

    def inverse(self, damping: Tensor) -> Callable[[Tensor], Tensor]:
        """The map v [m, blocks, width] -> (M_b / n + damping_b)^-1 v_b, float64; damping: [blocks], in the
        units of M. A block in which no row has a gradient gives zeros."""
        live = (self.trace > 0) & (damping > 0)
        scale = torch.where(live, 1 / torch.where(live, self.size, 1.0) ** 2, 0.0)
        relative = torch.where(live, damping * scale, 1.0)
        if self.matrix is not None:
            eye = torch.eye(self.matrix.shape[1], dtype=torch.float64, device=self.matrix.device)
            factors = [
                torch.linalg.cholesky(m.double() / self.n + d * eye)
                for m, d in zip(self.matrix, relative, strict=True)
            ]

            def by_matrix(v: Tensor) -> Tensor:
                solved = [torch.cholesky_solve(v[:, b].double().T, f).T for b, f in enumerate(factors)]
                return torch.stack(solved, 1) * scale[:, None]

            return by_matrix
        assert self.rows is not None
        by_block = self.rows.transpose(0, 1).double()  # [blocks, n, width]
        gram = by_block @ by_block.mT
        eye = torch.eye(self.n, dtype=torch.float64, device=gram.device)
        factors = [torch.linalg.cholesky(g + self.n * d * eye) for g, d in zip(gram, relative, strict=True)]

        def by_rows(v: Tensor) -> Tensor:
            solved = []
            for b, factor in enumerate(factors):
                x = v[:, b].double()
                within = torch.cholesky_solve(by_block[b] @ x.T, factor)
                solved.append((x - within.T @ by_block[b]) / relative[b])
            return torch.stack(solved, 1) * scale[:, None]

        return by_rows


def squares(cache: Cache, normalize: str, device: torch.device) -> tuple[int, Tensor]:
    """How many rows count, and the mean over them of |y_nb|^2, from their lengths: [blocks] float64."""
    total = torch.zeros(len(cache.layers), dtype=torch.float64)
    n = 0
    for _, part in cache.shards():
        live = (cache.code.lengths(part.code) > 0) & (part.status == 0)[:, None]
        scales = row_scales(cache.code, part.code, normalize)
        total += (live if scales is None else scales.double().square() * live).sum(0)
        n += int((part.status == 0).sum())
    return n, (total / max(1, n)).to(device)


def moment(
    cache: Cache,
    normalize: str,
    blocks: slice,
    mean_square: Tensor,
    device: torch.device,
    *,
    weights: Weights | None = None,
    most: int | None = None,
) -> Moment:
    """The second moment of some blocks, from one pass over the cache; mean_square: of these blocks, as
    `squares` gives it; most: from no more than so many rows, evenly spaced."""
    rows = count(cache)
    expected = rows if most is None else min(rows, most)
    width = cache.manifest.width
    size = torch.where(mean_square > 0, mean_square, 1.0).sqrt()
    matrix = torch.zeros(len(size), width, width, device=device) if expected >= width else None
    kept: list[Tensor] = []
    trace, n = torch.zeros_like(size), 0
    for _, y in vectors_of(cache, normalize, device, blocks=blocks, most=most):
        square = y.double().square().sum(2)
        y = (y / size[:, None]).float()
        weight = torch.ones_like(square) if weights is None else weights(square)
        trace += (weight * square / size**2).sum(0)
        y = y * weight.sqrt().float()[:, :, None]
        n += len(y)
        if matrix is None:
            kept.append(y)
        else:
            by_block = y.transpose(0, 1)
            matrix.baddbmm_(by_block.mT, by_block)
    return Moment(n, size, trace, matrix, torch.cat(kept) if matrix is None else None)
