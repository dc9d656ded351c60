"""Second moments of a cache's rows, block by block: ``M_b = sum_n w_nb y_nb y_nb^T``.

Kept as a matrix [width, width], or, where there are fewer rows than that, as the rows themselves: the same
products by the Woodbury identity, in less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.vectors import count, row_scales, vectors_of
from rapidin.cache import Cache

LOTS = 32  # more processes than that have no part in a sum over a cache
_SENT_BYTES = 256 << 20  # of the lots that a process is sent at a time

# Weights [n, blocks] of rows from their squared lengths [n, blocks], both float64.
Weights = Callable[[Tensor], Tensor]


@dataclass
class Moment:
    """M_b of some blocks.

    n: rows it was made of; size: [blocks] float64, the root mean square length of a row, by which rows are
    divided first, so that tiny gradients stay in float32's range. Of the divided rows: matrix [blocks, width,
    width] float32 or None, rows [n, blocks, width] float32 or None; in float64 [blocks]: trace and fourth,
    the sums of |y|^2 and |y|^4 as the lengths say, and noisy, that of |y|^4 as the code tells it.
    """

    n: int
    size: Tensor
    trace: Tensor
    fourth: Tensor
    noisy: Tensor
    matrix: Tensor | None
    rows: Tensor | None

    @property
    def square(self) -> Tensor:
        """trace(M_b^2) of the divided rows, each of them as long as it was: [blocks] float64.

        That is sum_ij <y_i, y_j>^2, in which the code's noise stands where i = j.
        """
        if self.matrix is not None:
            found = self.matrix.double().square().sum((1, 2))
        else:
            assert self.rows is not None
            by_block = self.rows.transpose(0, 1)
            found = torch.stack([(rows @ rows.T).double().square().sum() for rows in by_block])
        return (found - self.noisy).clamp(min=0) + self.fourth

    def times(self, v: Tensor) -> Tensor:
        """M_b v_b, of v [m, blocks, width]: the same shape, float64."""
        v = v.double() * self.size[:, None] ** 2
        if self.matrix is not None:
            return torch.einsum("mbk,bkl->mbl", v, self.matrix.double())
        assert self.rows is not None
        rows = self.rows.double()
        return torch.einsum("mbn,nbk->mbk", torch.einsum("mbk,nbk->mbn", v, rows), rows)


class Inverse:
    """The map v [m, blocks, width] -> (M_b / n + damping_b)^-1 v_b, float64.

    damping: [blocks] float64, in the units of M. A block in which no row has a gradient gives zeros.
    """

    def __init__(self, moment: Moment, damping: Tensor) -> None:
        live = (moment.trace > 0) & (damping > 0)
        self._n = moment.n
        self._scale = torch.where(live, 1 / torch.where(live, moment.size, 1.0) ** 2, 0.0)
        self._damping = torch.where(live, damping * self._scale, 1.0)
        if moment.matrix is not None:
            self._rows = None
            eye = torch.eye(moment.matrix.shape[1], dtype=torch.float64, device=damping.device)
            matrices = [m.double() / self._n for m in moment.matrix]
        else:
            assert moment.rows is not None
            self._rows = moment.rows.transpose(0, 1)  # [blocks, n, width]
            eye = torch.eye(self._n, dtype=torch.float64, device=damping.device)
            matrices = [rows @ rows.T / self._n for rows in map(Tensor.double, self._rows)]
        self._factors = [
            torch.linalg.cholesky(m + d * eye) for m, d in zip(matrices, self._damping, strict=True)
        ]

    def __call__(self, v: Tensor) -> Tensor:
        solved = []
        for b, factor in enumerate(self._factors):
            x = v[:, b].double()
            if self._rows is None:
                solved.append(torch.cholesky_solve(x.T, factor).T)
            else:
                rows = self._rows[b].double()
                within = torch.cholesky_solve(rows @ x.T, factor) / self._n
                solved.append((x - within.T @ rows) / self._damping[b])
        return torch.stack(solved, 1) * self._scale[:, None]

    def leverage(self, y: Tensor) -> Tensor:
        """<y_b, (M_b / n + damping_b)^-1 y_b> / n of rows that M was made of [m, blocks, width]: [m, blocks]
        float64, from 0 to below 1: the part of a row in what it is compared by."""
        if self._rows is not None:
            found = (y.double() * self(y)).sum(2)
        else:
            # In float32, which is quicker and true enough for a factor.
            parts = [
                torch.linalg.solve_triangular(factor.float(), y[:, b].float().T, upper=False).square().sum(0)
                for b, factor in enumerate(self._factors)
            ]
            found = torch.stack(parts, 1).double() * self._scale
        return (found / self._n).clamp(0, 1 - 1e-6)


def squares(cache: Cache, normalize: str, device: torch.device) -> tuple[int, Tensor]:
    """How many rows count, and the mean over them of |y_nb|^2, from their lengths: [blocks] float64.

    Of several processes, which all call this, each reads its part of the shards; sums are added in the order
    of shards, so that the same comes out.
    """
    world, shards = distributed.world(), cache.manifest.shards
    low, high = world.part(len(shards))
    within = (shards[low].first, shards[high - 1].first + shards[high - 1].rows) if low < high else (0, 0)
    sums: list[tuple[Tensor, int]] = []
    for _, part in cache.shards(within=within):
        live = (cache.codec.lengths(part.tensors) > 0) & (part.status == 0)[:, None]
        scales = row_scales(cache.codec, part.tensors, normalize)
        found = (live if scales is None else scales.double().square() * live).sum(0)
        sums.append((found, int((part.status == 0).sum())))
    total, n = torch.zeros(len(cache.layers), dtype=torch.float64, device="cpu"), 0
    for found, rows in (pair for parts in world.gather(sums) for pair in parts):
        total += found
        n += rows
    return n, (total / max(1, n)).to(device)


def summed(cache: Cache, like: Tensor, part: Callable[[tuple[int, int]], Tensor]) -> Tensor:
    """The sum over a cache of what `part` makes of the rows from one to before another, [Q, ...] float64 as
    `like`.

    Of several processes, which all call this, each calls `part` for its own rows. Shards are summed up in at
    most LOTS lots, which depend on the cache alone, and lots are added in order: so the bits are the same for
    any number of processes, and few sums have to be sent.
    """
    world, shards = distributed.world(), cache.manifest.shards
    lots = min(LOTS, len(shards))
    edges = [len(shards) * lot // lots for lot in range(lots + 1)] if lots else [0]
    low, high = world.part(lots)
    rows = [
        (shards[first].first, shards[last - 1].first + shards[last - 1].rows)
        for first, last in pairwise(edges[low : high + 1])
    ]
    total = torch.zeros_like(like)
    if world.alone:
        for within in rows:
            total += part(within)
        return total
    own = [part(within).cpu() for within in rows]
    size = max(1, _SENT_BYTES * len(like) // max(1, lots * 8 * like.numel()))
    for queries in (slice(at, at + size) for at in range(0, len(like), size)):
        gathered = world.gather([lot[queries].clone() for lot in own])
        for lot in (lot for of_one in gathered for lot in of_one):
            total[queries] += lot.to(total.device)
    return total


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
    trace, fourth, noisy, n = torch.zeros_like(size), torch.zeros_like(size), torch.zeros_like(size), 0
    for _, y, true in vectors_of(cache, normalize, device, blocks=blocks, most=most):
        if weights is not None:
            y = y * weights(y.double().square().sum(2)).sqrt()[:, :, None]
        y = (y / size[:, None]).float()
        n += len(y)
        trace += (true / size**2).sum(0)
        fourth += (true / size**2).square().sum(0)
        noisy += y.double().square().sum(2).square().sum(0)
        if matrix is None:
            kept.append(y)
        else:
            by_block = y.transpose(0, 1)
            matrix.baddbmm_(by_block.mT, by_block)
    return Moment(n, size, trace, fourth, noisy, matrix, torch.cat(kept) if matrix is None else None)
