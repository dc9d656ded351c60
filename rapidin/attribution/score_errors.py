"""How sure a score is: what each layer brings to it, its standard error, and the ranks that it could have.

A sketch throws the numbers of a gradient into bins by a random hash. A score is a sum over bins j of
products, so how they spread tells what another hash would have given. With v the query's vector, y the row's
and ``s = sum_j v_j y_j`` the score of a block:

    none            e_j = v_j y_j
    layer           e_j = v_j y_j - s (a_j^2 + z_j^2) / 2     a, z: v and y, at length 1 in the block
    cosine          the same with s the whole score, and a, z at length 1 in all blocks together
    SE^2          = sum_b c_b / (c_b + 1) k / (k - 1) sum_j (e_bj - mean_j e_bj)^2

with k the bins of a block and c_b the others that a number of its gradient shares its bin with, on average
over hashes: the spread of the e holds each number's own product, which no hash changes, and is too large by a
part in c. It matters for small parameters alone; where no two numbers meet there is no error.

The second term is the delta method (Cramér, 1946, section 28.4): lengths are estimates from the same bins,
and their errors are the score's. An example compared with itself has no error then. Blocks have hashes of
their own, but for those of one parameter at several points or in several caches of one seed: their e are
added up before they are squared.

What is taken for granted: bins are exchangeable, and no few numbers are nearly all of a gradient. Of a part
of a generation, v is divided by the length of the whole, which is then a. The methods `datainf` and `fisher`
have v = M q; M counts as known, and a is the direction of v. The same holds for the mean of several
generations. Codes of few bits add noise, which spreads over all bins and so is in the SE; that they pull
scores towards zero is not. Measured in docs/guide/reading.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rapidin.attribution.scan import some_rows
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.codec import FloatCodec
from rapidin.gradients.parameters import matrix_shape

SURE = 1.96  # standard errors between two scores from which their order is told: wrong in 5% of equal pairs
_CHUNK_BYTES = 64 << 20  # of decoded rows that are held at a time


@dataclass(frozen=True, slots=True)
class Details:
    """What scores are made of. On the CPU.

    scores, errors: [Q, m] float32, NaN where there is no row; parts: [Q, m, layers] float32, which sum to the
    scores, of `layers`, parameters by name. No error is known where a block has one bin: NaN.
    """

    scores: Tensor
    errors: Tensor
    parts: Tensor
    layers: tuple[str, ...]


def details(
    sources: CacheScan | Sequence[CacheScan],
    rows: Tensor,
    *,
    wholes: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Details:
    """Scores of chosen rows with their standard errors and the part of each layer, from the rows alone.

    sources: as `rapidin.attribution.scan.scan_cache` takes them; scores of several are added up. rows: [Q, m]
    int64, of each query its own, below 0 for none. wholes: for each query the number of the query whose
    length it was divided by: itself by default, for a part of a generation the generation. device: by default
    where the queries' vectors are. Raises IndexError for a row that a cache does not hold.
    """
    sources = [sources] if isinstance(sources, CacheScan) else list(sources)
    device = sources[0].query.vectors.device if device is None else device
    names = list(dict.fromkeys(b.name for source in sources for b in source.cache.layers))
    columns = [
        torch.tensor([names.index(b.name) for b in source.cache.layers], device=device) for source in sources
    ]
    queries, m = rows.shape
    wholes = range(queries) if wholes is None else wholes
    scores = torch.full((queries, m), torch.nan, device="cpu")
    errors = scores.clone()
    parts = torch.full((queries, m, len(names)), torch.nan, device="cpu")
    most = max(1, _CHUNK_BYTES // (4 * sum(source.cache.manifest.dim for source in sources)))
    for query, own in enumerate(rows.cpu()):
        place = (own >= 0).nonzero()[:, 0]
        for some in torch.split(place[own[place].argsort(stable=True)], most):
            if len(some):
                found = _some(sources, columns, len(names), own[some], query, wholes[query], device)
                scores[query, some], errors[query, some], parts[query, some] = found
    return Details(scores, errors, parts, tuple(names))


def _some(
    sources: Sequence[CacheScan],
    columns: Sequence[Tensor],
    layers: int,
    rows: Tensor,
    query: int,
    whole: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n], errors [n] and parts [n, layers] of ascending rows [n] for one query, on the CPU."""
    parts = torch.zeros(len(rows), layers, dtype=torch.float64, device=device)
    # Gradients may be tiny, and products of four of their numbers leave float32's range: all in these units.
    size = max(float(source.query.vectors[query].abs().max()) for source in sources) or 1.0
    spread: dict[object, tuple[Tensor, Tensor]] = {}  # by hash
    units = []
    loaded = []
    for source in sources:
        unit, scales = _rows(source, rows, device)
        loaded.append((unit, scales))
        units.append(1.0 if scales is None else float(scales.abs().max()))
    row_size = max(units) or 1.0
    for source, (unit, scales), column in zip(sources, loaded, columns, strict=True):
        vectors = source.query.vectors.to(device)
        v = vectors[query] / size
        y = unit if scales is None else unit * (scales / row_size)[:, :, None]
        e = v * y
        block = e.sum(2)
        parts.index_add_(1, column, block.double())
        normalize = source.query.normalize
        if normalize != "none":
            axes = (1, 2) if normalize == "cosine" else (2,)
            a, z = vectors[whole], y.square()
            a = a.square() / a.square().sum([axis - 1 for axis in axes], keepdim=True).clamp(min=1e-38)
            z /= z.sum(axes, keepdim=True).clamp(min=1e-38)
            s = block.sum(1, keepdim=True) if normalize == "cosine" else block
            e -= z.add_(a).mul_((s / 2)[:, :, None])
        blocks = source.cache.layers
        points = len({b.at for b in blocks})
        e = e.view(len(rows), points, len(blocks) // points, -1).sum(1)
        sketch = source.cache.manifest.sketch
        hashed = (*sketch.values(), *(b.name for b in blocks))
        if hashed in spread:
            e += spread[hashed][0]
        spread[hashed] = e, _meeting(source.cache)
    square = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for e, meeting in spread.values():
        k = e.shape[2]
        e -= e.mean(2, keepdim=True)
        by_block = e.square().sum(2).double() * meeting.to(device)
        square += by_block.sum(1) * (k / (k - 1) if k > 1 else torch.nan)
    scale = size * row_size
    return tuple(x.float().cpu() for x in (parts.sum(1) * scale, square.sqrt() * scale, parts * scale))  # type: ignore[return-value]


def _meeting(cache: Cache) -> Tensor:
    """c / (c + 1) of each parameter [layers] float64. 1 for codes of few bits: most of their error is not the
    hash's."""
    blocks = {b.name: b.shape for b in cache.layers}
    if not isinstance(cache.codec, FloatCodec):
        return torch.ones(len(blocks), dtype=torch.float64, device="cpu")
    tensor, k = cache.manifest.sketch["projection"] == "tensor", cache.manifest.width
    shapes = [matrix_shape(shape) if tensor else (1, prod(shape)) for shape in blocks.values()]
    meeting = torch.tensor([partners(*shape, k) for shape in shapes], dtype=torch.float64, device="cpu")
    return meeting / (meeting + 1)


def partners(rows: int, columns: int, k: int) -> float:
    """How many numbers of a matrix [rows, columns] share the bin of a number of it, on average over numbers
    and hashes (docs/reference/sketch.md, section 2; a flat sketch is that of one row)."""
    same_bin, near, far = zip(*(_side(n, k) for n in (rows, columns)), strict=True)
    # Within a chunk bins differ, each other difference is as likely; between chunks all are.
    both = near[0] * near[1] / max(1, k - 1) + (near[0] * far[1] + far[0] * near[1] + far[0] * far[1]) / k
    return float(sum(same_bin) + both)


def _side(n: int, k: int) -> tuple[float, float, float]:
    """Of an index below n: the others that have its bin, the others in its chunk, and those that are not."""
    whole, left = divmod(n, k)
    near = (whole * k**2 + left**2) / max(1, n)
    return (n - near) / k, near - 1, n - near


def _rows(source: CacheScan, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """What the code tells of rows [n], ascending: [n, blocks, width], and the scales of their blocks
    [n, blocks], or None."""
    code = source.cache.codec.to(device)
    decoded, scaled = [], []
    for some in some_rows(source, rows):
        there = some.to(device)
        decoded.append(code.decode(there.stored))
        scaled.append(source.query.scales(code, there.stored, there.factors))
    unit = torch.cat(decoded) if decoded else torch.zeros(0, device=device)
    if len(unit) != len(rows):
        raise IndexError(f"some of the rows {rows.tolist()[:3]}... are not in the cache {source.cache.path}")
    scales = [scale for scale in scaled if scale is not None]
    return unit, torch.cat(scales) if scales else None


@dataclass(frozen=True, slots=True)
class Place:
    """first, last: the ranks that a hit could have, from 1; tied: it cannot be told from the one before."""

    first: int
    last: int
    tied: bool


def places(scores: Sequence[float], errors: Sequence[float]) -> list[Place]:
    """Where each of these scores could stand, best first as they are given (for the other end of a ranking:
    with their signs turned).

    A score is ahead of another where it is more than `SURE` standard errors of their difference above it.
    The errors of two count as independent. Ranks are among those given: more candidates than are shown make
    the last ranks true, up to their number.
    """
    score = torch.tensor(scores, dtype=torch.float64, device="cpu")
    error = torch.tensor(errors, dtype=torch.float64, device="cpu").nan_to_num(nan=torch.inf)
    found = []
    for n in range(len(score)):
        gap = score - score[n]
        reach = SURE * torch.hypot(error, error[n])
        others = torch.arange(len(score), device="cpu") != n
        ahead = int(((gap > reach) & others).sum())
        maybe = int(((gap >= -reach) & others).sum())
        tied = n > 0 and not bool(gap[n - 1] > reach[n - 1])
        found.append(Place(1 + ahead, 1 + maybe, tied))
    return found
