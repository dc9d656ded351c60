"""The damped inverse of each block's second moment, as TRAK, LoGra and TrackStar take it.

    F_b = 1/n sum_n y_nb y_nb^T        (F_b + damping * trace(F_b^2) / trace(F_b))^-1 v_b

For gradients of a log-likelihood F is the empirical Fisher information, which stands for the Hessian. TRAK
(Park et al., ICML 2023, eq. 13) inverts the moment of projected gradients of the whole model without
damping; LoGra (Choe et al., 2024, section 4) and TrackStar (Chang et al., 2024, section 3) layer by layer,
damped, as here. Damping is in units of the mean eigenvalue, each weighted by itself: unlike their plain
mean it depends neither on how many rows there are nor on the width of the sketch. One default then does for
all settings measured in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rapidin.cache import Cache
from rapidin.methods.moment import Moment, moment, squares
from rapidin.methods.vectors import block_groups, count

DAMPING = 0.2


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
        yield found.inverse(damping * _typical_eigenvalue(found)), blocks


def _typical_eigenvalue(found: Moment) -> Tensor:
    """trace(F_b^2) / trace(F_b): [blocks] float64, 0 where no row has a gradient."""
    live = found.trace > 0
    ratio = found.square / torch.where(live, found.trace, 1.0)
    return torch.where(live, ratio * found.size**2 / max(1, found.n), 0.0)
