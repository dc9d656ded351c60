"""What leaving a group of examples out changes, given that the other groups stay.

The sum of a group's scores is what its gradients add up to. If another group says the same, leaving one of
them out changes little, and the sum does not show it: it is the same for both. A Newton step for the removal
of a group (Koh, Ang, Teo & Liang, *On the Accuracy of Influence Functions for Measuring Group Effects*,
NeurIPS 2019, section 3) does. With the unit gradients s_n of all examples, preconditioned as they are cached,

    net(q, G) = q^T (I + C_-G / d)^-1 sum_{n in G} s_n,    C_-G = sum_{n not in G} s_n s_n^T

in which d is the damping, in units of one example's moment: without other examples it is the sum of the
scores ``<q, s_n>``, and each example elsewhere that is like those of G makes it smaller. To first order it is
the sum minus ``1/d sum_m <q, s_m> <s_m, s_G>`` over the others, a term for each pair of a group and another.

C_-G has the rows and columns of a whole sketch. It is used in the span of the query and of the groups' sums,
in which each example has as many coordinates as there are groups: their products with all examples come from
one scan. studies/interactions measures what that leaves out, and chose `DAMPING`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.vectors import ScanQuery
from rapidin.attribution.normalization import query_vectors, row_scales, score_divisor
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.build import sample_rows

DAMPING = 3.0
MOST_GROUPS = 128  # whose sums span the space: those with the largest sums of scores for any query
STREAM = 20  # of the keyed hash in docs/reference/sketch.md that draws the examples of a sum
_LEAST = 1e-6  # eigenvalues of the spanning sums that count as zero, of the largest
_DECODED = 64  # rows whose decoded lengths say how much noise a code adds

# Gives the sketches [n, blocks, width] of rows, before a codec has stored them.
Sketches = Callable[[Sequence[int]], Tensor]


def net_of_others(
    scan: CacheScan,
    scores: Tensor,
    group_of_row: Tensor,
    count: int,
    sketches: Sketches,
    *,
    rows_of_a_sum: int = 64,
    damping: float = DAMPING,
) -> Tensor:
    """``net`` above for each query and group: [Q, groups] float64.

    scan: of one cache, for queries by `dot` with the normalization `layer` or `cosine`, by which an example
    is as like itself as 1; scores: [Q, rows] of it, NaN for rows that do not count; group_of_row: [rows]
    int64, below 0 for rows without a group; count: groups; sketches: see `stored_sketches`; rows_of_a_sum:
    examples of a group that the direction of its sum is estimated from. The leading process runs this alone.
    """
    scored = ~scores.isnan().any(0)
    known = scores[:, scored].double()
    members = [(group_of_row[scored] == group).nonzero()[:, 0] for group in range(count)]
    sums = torch.stack([known[:, rows].sum(1) for rows in members], 1)
    numbers = scored.nonzero()[:, 0]
    spanning = [numbers[members[group]] for group in _largest(sums)]
    span = _Span.of(scan, spanning, scored, sketches, rows_of_a_sum)
    noise = _noise(scan.cache, numbers, scan.query.normalize)
    net = torch.empty_like(sums)
    for query, vector in enumerate(scan.query.vectors[: len(scores)]):
        # Coordinates in which the query, and with it each score, is represented without error.
        asked, rows = span.with_query(vector, known[query])
        moment = rows @ rows.T
        for group, of_group in enumerate(members):
            inside = rows[:, of_group]
            others = _without_noise(moment - inside @ inside.T, noise * (len(numbers) - len(of_group)))
            others = others / damping + torch.eye(len(rows), dtype=torch.float64)
            net[query, group] = asked @ torch.linalg.solve(others, inside.sum(1))
    return net


def stored_sketches(cache: Cache, rows: Sequence[int]) -> Tensor:
    """The sketches of rows as a cache has them: [n, blocks, width].

    They are what `net_of_others` needs if the cache stores floats. A code of few bits stores like examples
    with like errors, which would look as if they had more in common.
    """
    unit = cache.sketches(list(rows)).view(len(rows), len(cache.layers), -1)
    return unit * cache.lengths(list(rows))[:, :, None]


def _largest(sums: Tensor) -> list[int]:
    """The groups with the largest sums of scores [Q, groups], by size, for any query."""
    order = torch.sort(sums.abs().amax(0), descending=True, stable=True).indices
    chosen: list[int] = order[:MOST_GROUPS].tolist()
    return chosen


def _noise(cache: Cache, rows: Tensor, normalize: str) -> float:
    """The variance that a code adds to the product of a row and a vector of length 1, of some of these rows:
    the square by which it makes a row longer, spread over all directions."""
    seed, blocks = cache.manifest.sketch["seed"], len(cache.layers)
    some: list[int] = rows[sample_rows(len(rows), _DECODED, seed, STREAM)].tolist()
    scales = row_scales(cache.lengths(some), normalize).double()
    unit = cache.sketches(some).double().view(len(some), blocks, -1)
    longer = ((unit * scales[:, :, None]).square().sum((1, 2)) - scales.square().sum(1)).mean()
    return max(0.0, float(longer)) / score_divisor(blocks, normalize) / unit[0].numel()


def _without_noise(moment: Tensor, noise: float) -> Tensor:
    """A moment less the noise in each direction, as far as there is so much."""
    values, vectors = torch.linalg.eigh(moment)
    kept: Tensor = (vectors * (values - noise).clamp(min=0.0)) @ vectors.T
    return kept


@dataclass(frozen=True)
class _Span:
    """The sums of some examples of each of some groups.

    vectors: [groups, blocks * width]; gram: their inner products; products: with each row that counts,
    [groups, rows]; all float64. divisor: what products of vectors of scans are divided by.
    """

    vectors: Tensor
    gram: Tensor
    products: Tensor
    divisor: int

    @staticmethod
    def of(scan: CacheScan, rows: Sequence[Tensor], scored: Tensor, sketches: Sketches, most: int) -> _Span:
        """rows: the numbers of each group's rows, of which at most `most` are taken; scored: the rows that
        count."""
        cache, normalize = scan.cache, scan.query.normalize
        divisor, seed = score_divisor(len(cache.layers), normalize), cache.manifest.sketch["seed"]
        taken = [each[sample_rows(len(each), most, seed, STREAM)].tolist() for each in rows]
        made = query_vectors(sketches([row for some in taken for row in some]), normalize)
        parts = torch.split(made.double().flatten(1), [len(some) for some in taken])
        # As vectors of a scan they are divided by the divisor.
        vectors = torch.stack([part.sum(0) for part in parts])
        query = vectors.view(len(vectors), *made.shape[1:]).float().to(scan.query.vectors.device)
        world = distributed.world()
        with distributed.using(world if world.alone else distributed.World()):
            products = all_scores(CacheScan(cache, ScanQuery(query, normalize)))[:, scored]
        vectors = vectors.cpu() * divisor
        return _Span(vectors, vectors @ vectors.T / divisor, products.double(), divisor)

    def with_query(self, vector: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of a query [n], and of each row that counts [n, rows], in an orthonormal basis of
        the groups' sums and the query.

        vector: of the query [blocks, width], as a scan has it; scores: of the rows.
        """
        flat = vector.double().cpu().flatten()
        products = torch.cat([self.vectors @ flat, (self.divisor * flat @ flat)[None]])
        gram = torch.cat([torch.cat([self.gram, products[:-1, None]], 1), products[None]])
        values, directions = torch.linalg.eigh(gram)
        kept = values > _LEAST * values[-1]
        basis = directions[:, kept] / values[kept].sqrt()
        return basis.T @ products, basis.T @ torch.cat([self.products, scores[None]])
