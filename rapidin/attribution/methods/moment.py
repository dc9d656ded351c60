"""Second moments of a cache's rows, block by block: ``M_b = sum_n w_nb y_nb y_nb^T``.

A moment is kept as a matrix [width, width], or, if there are fewer rows than that, as the rows themselves,
which give the same products by the Woodbury identity and take less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.vectors import count, shard_scales, vectors_of
from rapidin.cache import Cache

GROUPS = 32  # of shards in a sum over a cache, and so the most processes that can share the work

# Weights [n, blocks] of rows from their squared lengths [n, blocks], both float64.
Weights = Callable[[Tensor], Tensor]


@dataclass
class Moment:
    """M_b of some blocks.

    n: the number of rows it was computed from; size: [blocks] float64, the root mean square length of a row,
    by which rows are divided first, so that tiny gradients stay in float32's range. Of the divided rows:
    matrix [blocks, width, width] float32 or None; rows [n, blocks, width] float32 or None; [blocks] float64
    each: trace and fourth, the sums of |y|^2 and |y|^4 by the stored lengths; decoded_fourth, the sum of
    |y|^4 of the decoded rows, which contain the codec's noise.
    """

    n: int
    size: Tensor
    trace: Tensor
    fourth: Tensor
    decoded_fourth: Tensor
    matrix: Tensor | None
    rows: Tensor | None

    @property
    def square(self) -> Tensor:
        """trace(M_b^2) of the divided rows, each at its stored length: [blocks] float64.

        The trace is sum_ij <y_i, y_j>^2; the codec's noise biases the terms where i = j, which are replaced.
        """
        if self.matrix is not None:
            total = self.matrix.double().square().sum((1, 2))
        else:
            assert self.rows is not None
            by_block = self.rows.transpose(0, 1)
            total = torch.stack([(rows @ rows.T).double().square().sum() for rows in by_block])
        return (total - self.decoded_fourth).clamp(min=0) + self.fourth

    def times(self, v: Tensor) -> Tensor:
        """M_b v_b for v [m, blocks, width]: the same shape, float64."""
        v = v.double() * self.size[:, None] ** 2
        if self.matrix is not None:
            return torch.einsum("mbk,bkl->mbl", v, self.matrix.double())
        assert self.rows is not None
        rows = self.rows.double()
        return torch.einsum("mbn,nbk->mbk", torch.einsum("mbk,nbk->mbn", v, rows), rows)


class Inverse:
    """The map v [m, blocks, width] -> (M_b / n + damping_b)^-1 v_b, float64.

    damping: [blocks] float64, in the units of M. The result is 0 in a block in which all rows have zero
    gradient.
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
                coefficients = torch.cholesky_solve(rows @ x.T, factor) / self._n
                solved.append((x - coefficients.T @ rows) / self._damping[b])
        return torch.stack(solved, 1) * self._scale[:, None]

    def leverage(self, y: Tensor) -> Tensor:
        """<y_b, (M_b / n + damping_b)^-1 y_b> / n of rows y [m, blocks, width] that M was computed from:
        [m, blocks] float64, from 0 to below 1: the share of a row in the matrix that it is compared by."""
        if self._rows is not None:
            products = (y.double() * self(y)).sum(2)
        else:
            # In float32, which is faster, and accurate enough for a factor.
            by_block = [
                torch.linalg.solve_triangular(factor.float(), y[:, b].float().T, upper=False).square().sum(0)
                for b, factor in enumerate(self._factors)
            ]
            products = torch.stack(by_block, 1).double() * self._scale
        return (products / self._n).clamp(0, 1 - 1e-6)


def squares(cache: Cache, normalize: str, device: torch.device) -> tuple[int, Tensor]:
    """The number of rows that count, and the mean over them of |y_nb|^2 from their lengths: [blocks] float64.

    Collective: each process reads its share of the shards. Sums are added in the order of the shards, so that
    all processes get the same bits, for any number of processes.
    """
    world, shards = distributed.world(), cache.manifest.shards
    low, high = world.range_of(len(shards))
    within = (shards[low].first, shards[high - 1].first + shards[high - 1].rows) if low < high else (0, 0)
    sums: list[tuple[Tensor, int]] = []
    for _, shard in cache.shards(within=within):
        counts = shard.status == 0
        scales = shard_scales(cache.codec, shard.tensors, normalize)
        sums.append(((scales.double().square() * counts[:, None]).sum(0), int(counts.sum())))
    total, n = torch.zeros(len(cache.layers), dtype=torch.float64, device="cpu"), 0
    for of_shard, rows in (pair for share in world.gather(sums) for pair in share):
        total += of_shard
        n += rows
    return n, (total / max(1, n)).to(device)


def summed(
    cache: Cache, like: Tensor, sum_of_rows: Callable[[tuple[int, int]], Tensor], sent_bytes: int
) -> Tensor:
    """The sum of `sum_of_rows` over a cache: [Q, ...] float64 with the shape of `like`.

    sum_of_rows: called with a range of rows (first, end); sent_bytes: of the sums that are
    sent at a time. Collective: each process calls it for its own rows.
    Shards are summed in at most GROUPS groups, which depend on the cache only, and the sums of groups are
    added in order, so that the bits are the same for any number of processes, and few sums have to be sent.
    """
    world, shards = distributed.world(), cache.manifest.shards
    groups = min(GROUPS, len(shards))
    edges = [len(shards) * group // groups for group in range(groups + 1)] if groups else [0]
    low, high = world.range_of(groups)
    ranges = [
        (shards[first].first, shards[last - 1].first + shards[last - 1].rows)
        for first, last in pairwise(edges[low : high + 1])
    ]
    total = torch.zeros_like(like)
    if world.alone:
        for within in ranges:
            total += sum_of_rows(within)
        return total
    sums = [sum_of_rows(within).cpu() for within in ranges]
    size = max(1, sent_bytes * len(like) // max(1, groups * 8 * like.numel()))
    for queries in (slice(at, at + size) for at in range(0, len(like), size)):
        gathered = world.gather([of_group[queries].clone() for of_group in sums])
        for of_group in (of_group for share in gathered for of_group in share):
            total[queries] += of_group.to(total.device)
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
    """The second moment of some blocks, from one pass over the cache.

    mean_square: that of these blocks, from `squares`; weights: of the rows; most: uses at most that many
    rows, evenly spaced.
    """
    rows = count(cache)
    expected = rows if most is None else min(rows, most)
    width = cache.manifest.width
    size = torch.where(mean_square > 0, mean_square, 1.0).sqrt()
    matrix = torch.zeros(len(size), width, width, device=device) if expected >= width else None
    kept: list[Tensor] = []
    trace, fourth, decoded_fourth, n = (
        torch.zeros_like(size),
        torch.zeros_like(size),
        torch.zeros_like(size),
        0,
    )
    for _, y, square in vectors_of(cache, normalize, device, blocks=blocks, most=most):
        if weights is not None:
            y = y * weights(y.double().square().sum(2)).sqrt()[:, :, None]
        y = (y / size[:, None]).float()
        n += len(y)
        trace += (square / size**2).sum(0)
        fourth += (square / size**2).square().sum(0)
        decoded_fourth += y.double().square().sum(2).square().sum(0)
        if matrix is None:
            kept.append(y)
        else:
            by_block = y.transpose(0, 1)
            matrix.baddbmm_(by_block.mT, by_block)
    return Moment(n, size, trace, fourth, decoded_fourth, matrix, torch.cat(kept) if matrix is None else None)
