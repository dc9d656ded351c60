"""What leaving a group of examples out changes, given that the other groups stay.

The sum of a group's scores is what its gradients add up to. If another group says the same, leaving one of
them out changes little, and the sum does not show it: it is the same for both. A Newton step for the removal
of a group (Koh, Ang, Teo & Liang, *On the Accuracy of Influence Functions for Measuring Group Effects*,
NeurIPS 2019, section 3) does. With the normalized gradients s_m of all n examples, preconditioned as they
are cached,

    net(q, G) = q^T (I + C_-G / (n d))^-1 sum_{m in G} s_m,    C_-G = sum_{m not in G} s_m s_m^T

in which d is the damping times the mean of ``|s_m|^2``, which is 1 except with `weighted`, as of a mean over
the examples: data that are repeated as a whole keep their shares. Without other examples it is the sum of the
scores ``<q, s_m>``, and each example elsewhere that is like those of G makes it smaller. To first order it
is the sum minus ``1/(n d) sum_m <q, s_m> <s_m, s_G>`` over the others, a term for each pair of a group and
another.

C_-G has the rows and columns of a whole sketch. It is used in the span of the query and of the largest
groups' sums, in which each example has as many coordinates as there are such groups: their products with all
examples come from one scan. studies/interactions measures what that leaves out, and chose `DAMPING`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.methods.moment import squares
from rapidin.attribution.methods.vectors import ScanQuery, stored_sketches
from rapidin.attribution.normalization import of_directions, query_vectors, row_scales, score_divisor
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.cache.build import sample_rows
from rapidin.cache.codec import FloatCodec
from rapidin.data.encoding import Status
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.gradients.source import GradientSource

DAMPING = 0.0125  # of 240 examples it is the moment of three
MOST_GROUPS = 1000  # in a column
MOST_SPANNING = 128  # whose sums span the space: those with the largest sums of scores for any query
STREAM = 20  # of the keyed hash in docs/reference/sketch.md that draws the examples of a sum
_LEAST = 1e-6  # eigenvalues of the spanning sums that count as zero, of the largest
_DECODED = 64  # rows whose decoded lengths say how much noise a code adds
_MOST_NUMBERS = 1 << 26  # products of spanning sums with rows, which are held three times
# Rows from which the direction of a group's sum is estimated; of packed rows, whose gradients are computed
# again for that, of a group and of all.
_ROWS_OF_A_SUM, _PACKED_OF_A_SUM, _PACKED_IN_ALL = 64, 8, 256


@dataclass(frozen=True)
class RowSketches:
    """Gives the sketches of rows for the sums of groups.

    of: the sketches [n, blocks, width] of some rows of one group, before a codec has stored them; most: how
    many rows of a group are taken.
    """

    of: Callable[[Sequence[int]], Tensor]
    most: int = _ROWS_OF_A_SUM


def row_sketches(
    cache: Cache, groups: int, source: Callable[[], GradientSource], data: Examples
) -> RowSketches:
    """How the sketches of a cache's rows are had: from the cache if it stores floats, else by computing
    gradients again, since a code of few bits stores like examples with like errors, which would look as if
    they had more in common."""
    if isinstance(cache.codec, FloatCodec):
        return RowSketches(partial(stored_sketches, cache))
    most = _PACKED_IN_ALL // max(1, min(groups, MOST_SPANNING))
    return RowSketches(partial(_computed_again, source(), data), min(_PACKED_OF_A_SUM, most))


def _computed_again(source: GradientSource, data: Examples, rows: Sequence[int]) -> Tensor:
    if source.loaded.sharded:
        raise UserError(
            "`interactions` of rows in few bits need an unsharded model", "leave out `shard_model`"
        )
    sketches, status = source.sketches([source.example(data.get(row)) for row in rows])
    for row, failed in zip(rows, status.tolist(), strict=True):
        if failed != int(Status.OK):
            why = (
                "does not fit into memory" if failed == int(Status.TOO_LARGE) else "cannot be computed again"
            )
            raise UserError(f"the gradient of example {row} {why}", "leave out `interactions`")
    return sketches


def net_of_others(
    scan: CacheScan,
    scores: Tensor,
    group_of_row: Tensor,
    count: int,
    sketches: RowSketches,
    *,
    damping: float = DAMPING,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """``net`` above for each query and group: [Q, groups] float64.

    scan: of one cache, for queries by `dot` with a normalization other than `none`; scores: [Q, rows] of it,
    NaN for rows that do not count; group_of_row: [rows] int64, below 0 for rows without a group; count:
    groups; sketches: `row_sketches`; on_group: called with the number of sums that are done, and of all. The
    leading process runs this alone. Raises UserError for too many groups, or a gradient that cannot be
    computed again.
    """
    if count > MOST_GROUPS:
        raise UserError(
            f"the column has {count:,} values, and `interactions` are estimated for at most {MOST_GROUPS:,}",
            "name a column with fewer values",
        )
    scored = ~scores.isnan().any(0)
    numbers = scored.nonzero()[:, 0]
    if not count or not len(numbers):
        return torch.zeros(len(scores), count, dtype=torch.float64, device="cpu")
    known = scores[:, scored].double()
    members = _members(group_of_row[scored], count)
    sums = torch.stack([known[:, rows].sum(1) for rows in members], 1)
    most = max(1, min(MOST_SPANNING, _MOST_NUMBERS // len(numbers)))
    spanning = [numbers[members[group]] for group in _largest(sums, most)]
    span = _Span.of(scan, [rows for rows in spanning if len(rows)], scored, sketches, on_group)
    noise = _noise(scan.cache, numbers, scan.query.normalize)
    damped = damping * len(numbers) * _mean_square(scan.cache, scan.query.normalize)
    net = torch.empty_like(sums)
    for query, vector in enumerate(scan.query.vectors[: len(scores)]):
        # Coordinates in which the query, and with it each score, is represented without error.
        asked, rows = span.with_query(vector, known[query])
        moment = rows @ rows.T
        for group, of_group in enumerate(members):
            inside = rows[:, of_group]
            others = moment - inside @ inside.T
            if noise:
                others = _without_noise(others, noise * (len(numbers) - len(of_group)))
            others = others / damped + torch.eye(len(rows), dtype=torch.float64)
            net[query, group] = asked @ torch.linalg.solve(others, inside.sum(1))
    return net


def _members(group_of_row: Tensor, count: int) -> list[Tensor]:
    """The rows of each group, ascending; rows below 0 are in none."""
    order = torch.sort(group_of_row, stable=True).indices
    without = int((group_of_row < 0).sum())
    sizes = torch.bincount(group_of_row[order[without:]], minlength=count)
    return list(torch.split(order[without:], sizes.tolist()))


def _largest(sums: Tensor, most: int) -> list[int]:
    """The groups with the largest sums of scores [Q, groups], by size, for any query."""
    order = torch.sort(sums.abs().amax(0), descending=True, stable=True).indices
    chosen: list[int] = order[:most].tolist()
    return chosen


def _noise(cache: Cache, rows: Tensor, normalize: str) -> float:
    """The variance that a code of few bits adds to the product of a row and a vector of length 1, of some of
    these rows: the square by which it makes a row longer, spread over all directions."""
    if isinstance(cache.codec, FloatCodec):
        return 0.0
    seed, blocks = cache.manifest.sketch["seed"], len(cache.layers)
    longer = []
    for row in rows[sample_rows(len(rows), _DECODED, seed, STREAM)].tolist():
        scales = row_scales(cache.lengths([row]), normalize).double()
        unit = cache.sketches([row]).double().view(1, blocks, -1) * scales[:, :, None]
        longer.append(float(unit.square().sum() - scales.square().sum()) / unit.numel())
    return max(0.0, sum(longer) / len(longer)) / score_divisor(blocks, of_directions(normalize))


def _mean_square(cache: Cache, normalize: str) -> float:
    """The mean over the rows of their squared lengths, of which damping is a share."""
    if normalize != "weighted":
        return 1.0
    with distributed.by_itself():
        _, by_block = squares(cache, normalize, torch.device("cpu"))
    return float(by_block.sum()) / score_divisor(len(by_block), of_directions(normalize)) or 1.0


def _without_noise(moment: Tensor, noise: float) -> Tensor:
    """A moment less the noise in each direction, as far as there is so much."""
    values, vectors = torch.linalg.eigh(moment)
    kept: Tensor = (vectors * (values - noise).clamp(min=0.0)) @ vectors.T
    return kept


@dataclass(frozen=True)
class _Span:
    """The sums of some examples of each of some groups.

    vectors: [groups, blocks * width] float32; gram: their inner products; products: with each row that
    counts, [groups, rows] float32. divisor: what products of vectors of scans are divided by.
    """

    vectors: Tensor
    gram: Tensor
    products: Tensor
    divisor: int

    @staticmethod
    def of(
        scan: CacheScan,
        rows: Sequence[Tensor],
        scored: Tensor,
        sketches: RowSketches,
        on_group: Callable[[int, int], None],
    ) -> _Span:
        """rows: the numbers of each group's rows; scored: the rows that count."""
        cache, normalize = scan.cache, of_directions(scan.query.normalize)
        divisor, seed = score_divisor(len(cache.layers), normalize), cache.manifest.sketch["seed"]
        sums = []
        for done, each in enumerate(rows):
            on_group(done, len(rows))
            taken = each[sample_rows(len(each), sketches.most, seed, STREAM)].tolist()
            sums.append(query_vectors(sketches.of(taken), normalize).sum(0))
        on_group(len(rows), len(rows))
        # As vectors of a scan they are divided by the divisor.
        query = torch.stack(sums).float().to(scan.query.vectors.device)
        with distributed.by_itself():
            products = all_scores(CacheScan(cache, ScanQuery(query, scan.query.normalize)))[:, scored]
        vectors = query.flatten(1).cpu() * divisor
        return _Span(vectors, vectors.double() @ vectors.double().T / divisor, products, divisor)

    def with_query(self, vector: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates of a query [n], and of each row that counts [n, rows], float64, in an orthonormal
        basis of the groups' sums and the query.

        vector: of the query [blocks, width], as a scan has it; scores: of the rows.
        """
        flat = vector.double().cpu().flatten()
        products = torch.cat([(self.vectors.double() @ flat), (self.divisor * flat @ flat)[None]])
        gram = torch.cat([torch.cat([self.gram, products[:-1, None]], 1), products[None]])
        values, directions = torch.linalg.eigh(gram)
        kept = values > _LEAST * values[-1].clamp(min=1e-300)
        basis = directions[:, kept] / values[kept].sqrt()
        return basis.T @ products, basis.T @ torch.cat([self.products.double(), scores[None]])
