"""The damped inverse of each block's second moment, as TRAK, LoGra and TrackStar take it.

    F_b = 1/n sum_n y_nb y_nb^T        (F_b + damping * trace(F_b^2) / trace(F_b))^-1 v_b

For gradients of a log-likelihood F is the empirical Fisher information, which stands for the Hessian. TRAK
(Park et al., ICML 2023, eq. 13) inverts the moment of projected gradients of the whole model without
damping; LoGra (Choe et al., 2024, section 4) and TrackStar (Chang et al., 2024, section 3) layer by layer,
damped, as here. Damping is in units of the mean eigenvalue, each weighted by itself: unlike their plain
mean it depends neither on how many rows there are nor on the width of the sketch. One default then does for
all settings measured in docs/measured/results.md.

Each row is left out of the moment that it is compared by. With h_nb = <y_nb, (F_b + damping)^-1 y_nb> / n,
its leverage, that is a factor of 1 / (1 - h_nb) on its block (Sherman & Morrison, 1950). With whole sketches
it changes next to nothing; with few bits a row the noise of its code would stand in its own way, more so in
rows that the code has not learnt from.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.moment import Inverse, Moment, moment, squares
from rapidin.attribution.methods.vectors import block_groups, count, vectors_of
from rapidin.cache import Cache

DAMPING = 0.2
WHITE_DAMPING = (
    1.0  # of gradients that K-FAC's preconditioner has made nearly white: there is less left to undo
)


def most_rows(width: int) -> int:
    """Rows that a moment is taken from, at most: more would change it little."""
    return max(8192, 16 * width)


def turn(cache: Cache, vectors: Tensor, normalize: str, damping: float) -> tuple[Tensor, Tensor]:
    """((F_b + damping)^-1 v_b of query vectors [Q, blocks, width], the same shape in float64; factors of the
    cache's rows [rows, blocks] float32 on the CPU).

    Of several processes, which all call this, each inverts the moments of its part of the blocks, and all get
    the same bits, those of one alone.
    """
    world, layers, most = distributed.world(), len(cache.layers), most_rows(cache.manifest.width)
    out = torch.empty_like(vectors, dtype=torch.float64)
    factors = torch.ones(cache.table_rows(4 * layers), layers, device="cpu")
    own_blocks, seen = slice(*world.part(layers)), torch.zeros(0, dtype=torch.int64, device="cpu")
    for inverse, blocks in own(cache, normalize, damping, vectors.device, own_blocks):
        out[:, blocks] = inverse(vectors[:, blocks])
        found = []
        for places, y, _ in vectors_of(cache, normalize, vectors.device, blocks=blocks, most=most):
            factors[places, blocks] = (1 / (1 - inverse.leverage(y))).float().cpu()
            found.append(places)
        seen = torch.cat([seen[:0], *found])  # the same rows for all blocks
    mine = own_blocks, out[:, own_blocks].to("cpu", copy=True), seen, factors[seen, own_blocks]
    for blocks, solved, places, of_places in world.gather(mine):
        out[:, blocks] = solved.to(out.device)
        factors[places, blocks] = of_places
    return out, factors


def own(
    cache: Cache,
    normalize: str,
    damping: float,
    device: torch.device,
    within: slice = slice(None),
) -> Iterator[tuple[Inverse, slice]]:
    """(the map y [n, blocks, width] -> (F_b + damping)^-1 y_b, float64; which blocks), for all blocks, or
    those `within`."""
    width, most = cache.manifest.width, most_rows(cache.manifest.width)
    _, mean_square = squares(cache, normalize, device)
    each = 4 * width * min(width, count(cache), most)
    low, high, _ = within.indices(len(cache.layers))
    for group in block_groups(high - low, each):
        blocks = slice(low + group.start, low + group.stop)
        found = moment(cache, normalize, blocks, mean_square[blocks], device, most=most)
        yield Inverse(found, damping * _typical_eigenvalue(found)), blocks


def _typical_eigenvalue(found: Moment) -> Tensor:
    """trace(F_b^2) / trace(F_b): [blocks] float64, 0 where no row has a gradient."""
    live = found.trace > 0
    ratio = found.square / torch.where(live, found.trace, 1.0)
    return torch.where(live, ratio * found.size**2 / max(1, found.n), 0.0)
