"""The damped inverse of each block's second moment, as TRAK, LoGra and TrackStar take it.

    F_b = 1/n sum_n y_nb y_nb^T        (F_b + damping * trace(F_b) / min(n, width))^-1 v_b

For gradients of a log-likelihood F is the empirical Fisher information, which stands for the Hessian. TRAK
(Park et al., ICML 2023, eq. 13) inverts the moment of projected gradients of the whole model without
damping; LoGra (Choe et al., 2024, section 4) and TrackStar (Chang et al., 2024, section 3) layer by layer,
damped, as here. Damping is in units of the mean of the eigenvalues that can be other than zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rapidin.cache import Cache
from rapidin.methods.moment import Moment, moment, squares
from rapidin.methods.vectors import block_groups, count

DAMPING = 0.1


def most_rows(width: int) -> int:
    """Rows that a moment is taken from, at most: more would change it little."""
    return max(8192, 16 * width)


def turn(cache: Cache, vectors: Tensor, normalize: str, damping: float) -> Tensor:
    """(F_b + damping)^-1 v_b of query vectors [Q, blocks, width]: the same shape, float64."""
    out = torch.empty_like(vectors, dtype=torch.float64)
    for solve, blocks in own(cache, normalize, damping, vectors.device):
        out[:, blocks] = solve(vectors[:, blocks])
    return out


def own(
    cache: Cache, normalize: str, damping: float, device: torch.device
) -> Iterator[tuple[Callable[[Tensor], Tensor], slice]]:
    """(the map y [n, blocks, width] -> (F_b + damping)^-1 y_b, float64; which blocks), for all blocks."""
    width, most = cache.manifest.width, most_rows(cache.manifest.width)
    _, mean_square = squares(cache, normalize, device)
    each = 4 * width * min(width, count(cache), most)
    for blocks in block_groups(len(cache.layers), each):
        found = moment(cache, normalize, blocks, mean_square[blocks], device, most=most)
        yield found.inverse(damping * _mean_eigenvalue(found)), blocks


def _mean_eigenvalue(found: Moment) -> Tensor:
    """Mean of the eigenvalues of F_b that can be other than zero: [blocks] float64."""
    return found.trace * found.size**2 / max(1, found.n) / max(1, found.rank)
