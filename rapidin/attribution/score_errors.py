"""Standard errors of scores: from the spread over bins, with the contribution of each layer and the ranks
that a hit could have.

A sketch adds the numbers of a gradient up in bins by a random hash. A score is a sum over bins j of products,
so their spread estimates how much the score would differ with another hash. With v the query's vector, y the
row's and ``s = sum_j v_j y_j`` the score of a block:

    none            e_j = v_j y_j
    layer           e_j = v_j y_j - s (a_j^2 + z_j^2) / 2     a, z: v and y, at length 1 in the block
    cosine          the same with s the whole score, and a, z at length 1 in all blocks together
    weighted        e_j = v_j y_j - s z_j^2 / 2 - w S a_j^2 / 2     S: the whole score; w: the block's share
                                                              of the sum of the lengths of the blocks of v
                    The row's factor is treated as known; its error is a quarter of that of a length.
    SE^2          = sum_b c_b / (c_b + 1) k / (k - 1) sum_j (e_bj - mean_j e_bj)^2

with k the bins of a block and c_b the average number, over hashes, of other numbers in the bin of a number of
its gradient. The spread of the e includes each number's own product, which no hash changes, so it is too
large by the factor (c + 1) / c. That matters for small parameters only; if no two numbers share a bin, there
is no error.

The second term is the delta method (Cramér, 1946, section 28.4): lengths are estimated from the same bins,
and their errors enter the score. An example compared with itself then has no error. Blocks have independent
hashes, except those of one parameter at several points, or in several caches of one seed: their e are added
up before they are squared.

Assumptions: bins are exchangeable, and no few numbers make up nearly all of a gradient. For a target, v is
divided by the length of the whole generation, which is then a. The methods `datainf` and `fisher` have
v = M q; M is treated as known, and a is the direction of v. The same holds for the mean of several
generations. Codecs of few bits add noise, which spreads over all bins and so is in the SE; their bias towards
zero is not. Measured in docs/guide/reading.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rapidin.attribution.normalization import of_directions, products_of_directions, squared_directions
from rapidin.attribution.scan import some_rows
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.codec import FloatCodec
from rapidin.gradients.parameters import matrix_shape

SURE = 1.96  # standard errors between two scores that count as different: wrong for 5% of equal pairs
_CHUNK_BYTES = 16 << 20  # of decoded rows in memory at a time


@dataclass(frozen=True, slots=True)
class Details:
    """Scores with their errors and the contributions of layers, on the CPU.

    scores, errors: [Q, m] float32, NaN if there is no row; by_layer: [Q, m, layers] float32, the
    contributions of `layers`, parameters by name, which sum to the scores. The error is NaN if a block has a
    single bin.
    """

    scores: Tensor
    errors: Tensor
    by_layer: Tensor
    layers: tuple[str, ...]


def details(
    scans: CacheScan | Sequence[CacheScan],
    rows: Tensor,
    *,
    owners: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Details:
    """Scores of chosen rows with their standard errors and the contribution of each layer.

    scans: as for `rapidin.attribution.scan.scan_cache`; the scores of several are added up. rows: [Q, m]
    int64, the rows of each query, below 0 for none. owners: for each query the number of the query by whose
    length it is normalized: itself by default, the generation for a target. device: by default where the
    queries' vectors are. Raises IndexError for a row that a cache does not hold.
    """
    scans = [scans] if isinstance(scans, CacheScan) else list(scans)
    device = scans[0].query.vectors.device if device is None else device
    names = list(dict.fromkeys(block.name for scan in scans for block in scan.cache.layers))
    columns = [
        torch.tensor([names.index(block.name) for block in scan.cache.layers], device=device)
        for scan in scans
    ]
    queries, m = rows.shape
    owners = range(queries) if owners is None else owners
    scores = torch.full((queries, m), torch.nan, device="cpu")
    errors = scores.clone()
    by_layer = torch.full((queries, m, len(names)), torch.nan, device="cpu")
    size = max(1, _CHUNK_BYTES // (4 * sum(scan.cache.manifest.dim for scan in scans)))
    for query, of_query in enumerate(rows.cpu()):
        given = (of_query >= 0).nonzero()[:, 0]
        for chunk in torch.split(given[of_query[given].argsort(stable=True)], size):
            if len(chunk):
                scores[query, chunk], errors[query, chunk], by_layer[query, chunk] = _details_of_query(
                    scans, columns, len(names), of_query[chunk], query, owners[query], device
                )
    return Details(scores, errors, by_layer, tuple(names))


def _details_of_query(
    scans: Sequence[CacheScan],
    columns: Sequence[Tensor],
    layers: int,
    rows: Tensor,
    query: int,
    owner: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [n], errors [n] and contributions [n, layers] of ascending rows [n] for one query, on the CPU.

    columns: for each scan the layer of each block.
    """
    by_layer = torch.zeros(len(rows), layers, dtype=torch.float64, device=device)
    # Gradients may be tiny, and products of four of their numbers leave float32's range, so vectors and rows
    # are divided by these sizes first.
    query_size = max(float(scan.query.vectors[query].abs().max()) for scan in scans) or 1.0
    decoded = [_decoded_rows(scan, rows, device) for scan in scans]
    sizes = [1.0 if scales is None else float(scales.abs().max()) for _, scales in decoded]
    row_size = max(sizes) or 1.0
    deviations: dict[object, tuple[Tensor, Tensor]] = {}  # by hash: e, and the shares of errors
    for scan, (unit, scales), column in zip(scans, decoded, columns, strict=True):
        vectors = scan.query.vectors.to(device)
        y = unit / row_size if scales is None else unit * (scales / row_size)[:, :, None]
        products, e = _deviations(vectors[query] / query_size, y, vectors[owner], scan.query.normalize)
        by_layer.index_add_(1, column, products.double())
        blocks = scan.cache.layers
        points = len({block.at for block in blocks})
        e = e.view(len(rows), points, len(blocks) // points, -1).sum(1)
        sketch = scan.cache.manifest.sketch
        hash_key = (*sketch.values(), *(block.name for block in blocks))
        if hash_key in deviations:
            e += deviations[hash_key][0]
        deviations[hash_key] = e, _shares_of_errors(scan.cache)
    square = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for e, shares in deviations.values():
        k = e.shape[2]
        e -= e.mean(2, keepdim=True)
        by_block = e.square().sum(2).double() * shares.to(device)
        square += by_block.sum(1) * (k / (k - 1) if k > 1 else torch.nan)
    scale = query_size * row_size
    scores, errors, by_layer = by_layer.sum(1) * scale, square.sqrt() * scale, by_layer * scale
    return scores.float().cpu(), errors.float().cpu(), by_layer.float().cpu()


def _deviations(v: Tensor, y: Tensor, owner: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """(products of blocks [n, blocks], e [n, blocks, width]) of v and owner [blocks, width] with rows y
    [n, blocks, width]."""
    e = v * y
    products = e.sum(2)
    if normalize == "none":
        return products, e
    for x, of in ((y, of_directions(normalize)), (owner, normalize)):
        e -= squared_directions(x, of) * (products_of_directions(products, owner, of) / 2)[:, :, None]
    return products, e


def _shares_of_errors(cache: Cache) -> Tensor:
    """c / (c + 1) of each parameter [layers] float64. It is 1 for codecs of few bits, whose error is mostly
    not that of the hash."""
    shapes = {block.name: block.shape for block in cache.layers}
    if not isinstance(cache.codec, FloatCodec):
        return torch.ones(len(shapes), dtype=torch.float64, device="cpu")
    tensor, k = cache.manifest.sketch["projection"] == "tensor", cache.manifest.width
    matrices = [matrix_shape(shape) if tensor else (1, prod(shape)) for shape in shapes.values()]
    c = torch.tensor([partners(*shape, k) for shape in matrices], dtype=torch.float64, device="cpu")
    return c / (c + 1)


def partners(rows: int, columns: int, k: int) -> float:
    """The number of other numbers of a matrix [rows, columns] that share the bin of one of its numbers, on
    average over numbers and hashes (docs/reference/sketch.md, section 2; a flat sketch is that of one
    row)."""
    same_bin, near, far = zip(*(_pairs(n, k) for n in (rows, columns)), strict=True)
    # Within a chunk bins differ, and each other difference is as likely; between chunks all are.
    both = near[0] * near[1] / max(1, k - 1) + (near[0] * far[1] + far[0] * near[1] + far[0] * far[1]) / k
    return float(sum(same_bin) + both)


def _pairs(n: int, k: int) -> tuple[float, float, float]:
    """Averages over the indices below n: the other indices in the same bin, the others in the same chunk, and
    those in other chunks."""
    whole, left = divmod(n, k)
    near = (whole * k**2 + left**2) / max(1, n)
    return (n - near) / k, near - 1, n - near


def _decoded_rows(scan: CacheScan, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The decoded rows [n], ascending: [n, blocks, width], and the scales of their blocks [n, blocks], or
    None."""
    codec = scan.cache.codec.to(device)
    chunks = [chunk.to(device) for chunk in some_rows(scan, rows)]
    if sum(len(chunk.status) for chunk in chunks) != len(rows):
        raise IndexError(f"some of the rows {rows.tolist()[:3]}... are not in the cache {scan.cache.path}")
    # All at once: a codec with a basis reads all of it for each call, and rows are of many shards.
    names = chunks[0].stored if chunks else ()
    stored = {name: torch.cat([chunk.stored[name] for chunk in chunks]) for name in names}
    unit = codec.decode(stored) if chunks else torch.zeros(0, device=device)
    scales = [scan.query.scales(codec, chunk.stored, chunk.factors) for chunk in chunks]
    known = [scale for scale in scales if scale is not None]
    return unit, torch.cat(known) if known else None


@dataclass(frozen=True, slots=True)
class RankInterval:
    """first, last: the lowest and highest rank that a hit could have, from 1; tied: whether it cannot be told
    from the hit before it."""

    first: int
    last: int
    tied: bool


def rank_intervals(scores: Sequence[float], errors: Sequence[float]) -> list[RankInterval]:
    """The ranks that each of these scores could have; best first, as given (for the lowest scores of a
    ranking: with their signs flipped).

    A score is ahead of another if it is more than `SURE` standard errors of their difference above it. The
    errors of two scores count as independent. Ranks are among the given scores: with more candidates than are
    shown, the last ranks are right up to their number.
    """
    score = torch.tensor(scores, dtype=torch.float64, device="cpu")
    error = torch.tensor(errors, dtype=torch.float64, device="cpu").nan_to_num(nan=torch.inf)
    intervals = []
    for n in range(len(score)):
        gap = score - score[n]
        threshold = SURE * torch.hypot(error, error[n])
        others = torch.arange(len(score), device="cpu") != n
        ahead = int(((gap > threshold) & others).sum())
        maybe_ahead = int(((gap >= -threshold) & others).sum())
        tied = n > 0 and not bool(gap[n - 1] > threshold[n - 1])
        intervals.append(RankInterval(1 + ahead, 1 + maybe_ahead, tied))
    return intervals
