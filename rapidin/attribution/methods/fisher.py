"""The damped inverse of each block's second moment, as in TRAK, LoGra and TrackStar.

    F_b = 1/n sum_n y_nb y_nb^T        (F_b + damping * trace(F_b^2) / trace(F_b))^-1 v_b

For gradients of a log-likelihood F is the empirical Fisher information, which approximates the Hessian. TRAK
(Park et al., ICML 2023, eq. 13) inverts the moment of projected gradients of the whole model without damping;
LoGra (Choe et al., 2024, section 4) and TrackStar (Chang et al., 2024, section 3) invert it layer by layer
with damping, as here. The unit of the damping is the mean of the eigenvalues, each weighted by itself. Unlike
their plain mean it depends neither on the number of rows nor on the width of the sketch, so that one default
works for all settings measured in docs/measured/results.md.

Each row is left out of the moment that it is compared by: its block is multiplied by 1 / (1 - h_nb), where

    h_nb = <y_nb, (F_b + damping)^-1 y_nb> / n

is its leverage (Sherman & Morrison, 1950). With uncompressed sketches this changes almost nothing. With few
bits a row the noise of its codec would reduce its score, and more so in rows that the codec has not learnt
from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.moment import Inverse, Moment, moment, squares
from rapidin.attribution.methods.vectors import DEFAULT_LIMITS, Limits, block_groups, count, vectors_of
from rapidin.attribution.normalization import divide
from rapidin.cache import Cache

DAMPING = 0.2
# For gradients that K-FAC's preconditioner has made nearly white, so that less is left to precondition.
WHITE_DAMPING = 1.0


def precondition_query(
    cache: Cache, vectors: Tensor, normalize: str, damping: float, limits: Limits = DEFAULT_LIMITS
) -> tuple[Tensor, Tensor]:
    """((F_b + damping)^-1 v_b of query vectors [Q, blocks, width], the same shape in float64; factors of the
    cache's rows [rows, blocks] float32 on the CPU).

    Collective: each process inverts the moments of its share of the blocks, and all get the same bits, for
    any number of processes.
    """
    world, layers, most = distributed.world(), len(cache.layers), limits.most_rows(cache.manifest.width)
    out = torch.empty_like(vectors, dtype=torch.float64)
    factors = torch.ones(cache.table_rows(4 * layers), layers, device="cpu")
    share, used = slice(*world.range_of(layers)), torch.zeros(0, dtype=torch.int64, device="cpu")
    for inverse, blocks in block_inverses(cache, normalize, damping, vectors.device, limits, share):
        out[:, blocks] = inverse(vectors[:, blocks])
        chunks = []
        for rows, y, _ in vectors_of(cache, normalize, vectors.device, blocks=blocks, most=most):
            factors[rows, blocks] = (1 / (1 - inverse.leverage(y))).float().cpu()
            chunks.append(rows)
        used = torch.cat([used[:0], *chunks])  # the same rows for all blocks
    result = share, out[:, share].to("cpu", copy=True), used, factors[used, share]
    for blocks, solved, rows, factors_of_rows in world.gather(result):
        out[:, blocks] = solved.to(out.device)
        factors[rows, blocks] = factors_of_rows
    return out, factors


def block_inverses(
    cache: Cache,
    normalize: str,
    damping: float,
    device: torch.device,
    limits: Limits = DEFAULT_LIMITS,
    within: slice = slice(None),
) -> Iterator[tuple[Inverse, slice]]:
    """(the map y [n, blocks, width] -> (F_b + damping)^-1 y_b float64, its blocks), for all blocks `within`,
    in groups."""
    width = cache.manifest.width
    most = limits.most_rows(width)
    _, mean_square = squares(cache, normalize, device)
    block_bytes = 4 * width * min(width, count(cache), most)
    low, high, _ = within.indices(len(cache.layers))
    for group in block_groups(high - low, block_bytes, limits.block_bytes):
        blocks = slice(low + group.start, low + group.stop)
        of_blocks = moment(cache, normalize, blocks, mean_square[blocks], device, most=most)
        yield Inverse(of_blocks, damping * _typical_eigenvalue(of_blocks)), blocks


def _typical_eigenvalue(of_blocks: Moment) -> Tensor:
    """trace(F_b^2) / trace(F_b): [blocks] float64, 0 if all rows have zero gradient."""
    ratio = divide(of_blocks.square, of_blocks.trace)
    return ratio * of_blocks.size**2 / max(1, of_blocks.n)
