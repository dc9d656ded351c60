"""Evaluation `fidelity`: do scores from a cache rank rows as exact gradients do?

Exact gradients have the cache's preconditioner, and are compared by their factors
(`rapidin.attribution.token_contributions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rapidin.attribution.generate import generations_of
from rapidin.attribution.normalization import NORMALIZE, divide, query_divisors, row_factors, whole_lengths
from rapidin.attribution.query_sketch import QuerySketch, sketch_generations
from rapidin.attribution.token_contributions import exact_gradients
from rapidin.cache.codec.plan import typical_length
from rapidin.data.encoding import AnyExample
from rapidin.errors import UserError
from rapidin.evaluate import metrics
from rapidin.evaluate.log import Log, no_log
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.metrics import Floats
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, cache_settings
from rapidin.gradients.exact import ExactQueries, lengths_of
from rapidin.gradients.source import GradientSource

COLUMNS = {"spearman": "Spearman", "top10": "top 10 found"}


@dataclass(frozen=True)
class ExactProducts:
    """Products of exact gradients, layer by layer.

    cosines: [Q, N, L]; queries, rows: gradient norms, [Q, L] and [N, L].
    """

    cosines: Tensor
    queries: Tensor
    rows: Tensor

    def scores(self, normalize: str) -> Floats:
        """Scores [Q, N] of the method `dot` with this normalization."""
        cosines, q, n = self.cosines.double(), self.queries.double(), self.rows.double()
        if normalize == "layer":
            return cosines.mean(2).numpy()
        if normalize == "weighted":
            weights = divide(q, query_divisors(q, normalize))
            factors = row_factors(typical_length(n))
            return (torch.einsum("qnl,ql->qn", cosines, weights) * factors.T).numpy()
        dots = torch.einsum("qnl,ql,nl->qn", cosines, q, n)
        if normalize == "cosine":
            dots = divide(dots, whole_lengths(q) * whole_lengths(n).T)
        return dots.numpy()


def exact_products(
    source: GradientSource, queries: Sequence[AnyExample], rows: Sequence[AnyExample], log: Log = no_log
) -> ExactProducts:
    """Products of the exact gradients of `queries` and `rows`; each point of the path has its own layers."""
    queries, rows = source.prepared(queries), source.prepared(rows)
    layers = len(source.targets)
    cosines = torch.zeros(len(queries), len(rows), layers * len(source.points))
    query_norms, row_norms = (torch.zeros(len(texts), cosines.shape[2]) for texts in (queries, rows))
    for number, point in enumerate(source.points):
        block = slice(number * layers, (number + 1) * layers)
        with source.at(number):
            exact = ExactQueries(exact_gradients(source, text, number) for text in queries)
            query_norms[:, block] = exact.lengths.float()
            for n, text in enumerate(rows):
                gradients = exact_gradients(source, text, number)
                lengths = lengths_of(gradients)
                row_norms[n, block] = lengths.float()
                for m, gradient in enumerate(gradients):
                    scale = exact.lengths[:, m] * lengths[m]
                    cosines[:, n, number * layers + m] = divide(exact.products(m, gradient), scale).float()
                if n % 50 == 49:
                    log(f"exact gradients at {point:g}: {n + 1:,} of {len(rows):,} rows")
    return ExactProducts(cosines, query_norms, row_norms)


def evaluate(subject: Subject, records: Sequence[Any], count: int, *, seed: int = 0) -> Result:
    """Compare the scores of a cache with those of exact gradients, on `count` of its rows.

    Raises UserError for several caches, and for a projection or parameters without exact products here.
    """
    if len(subject.ensemble.caches) > 1:
        raise UserError("fidelity is measured for a single cache", "name one of the ensemble's caches")
    cache, source = subject.cache, subject.source
    if source.whole:
        raise UserError(
            "a cache of the projection 'rapidgrad' has no layers to compare",
            "make one with another projection",
        )
    chosen = _random_rows(cache.status().numpy(), count, seed)
    generations = generations_of(source, list(records))
    encoded = [source.example(subject.examples[int(row)]) for row in chosen]
    products = exact_products(
        source, [generation.encoded for generation in generations], encoded, subject.log
    )
    setting = cache_settings(subject.ensemble) | {"queries": len(generations), "compared": len(chosen)}
    result = Result("fidelity", setting, COLUMNS)
    sketch = QuerySketch(cache, sketch_generations(source, generations))
    for method, scores, _ in each_score([sketch], generations, [Method("dot", name) for name in NORMALIZE]):
        approximate, exact = scores[:, chosen], products.scores(method.normalize)
        result.add(
            str(method),
            {
                "spearman": metrics.estimate(metrics.spearman(approximate, exact)),
                "top10": metrics.estimate(metrics.overlap_at(exact, approximate, 10)),
            },
        )
    result.notes.append(
        f"{len(generations):,} queries against {len(chosen):,} of {len(cache):,} rows. Top 10 found: share "
        "of the exact scores' top ten that are in the cache's top ten. Intervals: over the queries."
    )
    return result


def _random_rows(status: npt.NDArray[Any], count: int, seed: int) -> npt.NDArray[np.int64]:
    """`count` random rows that have a sketch (status 0), in order."""
    usable = (status == 0).nonzero()[0]
    if len(usable) < 3 or count < 3:
        raise UserError(f"cannot compare {min(len(usable), count)} rows", "at least 3 are needed")
    return np.sort(np.random.default_rng(seed).permutation(usable)[:count])
