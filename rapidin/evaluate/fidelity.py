"""Do scores from a cache rank as exact gradients, in the cache's preconditioner, do?

Exact gradients are compared by their factors (`rapidin.attribution.token_contributions`).
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
from rapidin.attribution.query_sketch import QuerySketch, sketch_generations
from rapidin.attribution.token_contributions import ExactQueries, factors_of
from rapidin.data.encoding import Encoded
from rapidin.errors import UserError
from rapidin.evaluate import figures
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, about
from rapidin.gradients.source import GradientSource

COLUMNS = {"spearman": "Spearman", "top10": "top 10 found"}
NORMALIZE = ("layer", "cosine", "none")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Products:
    """Exact products: cosines [Q, N, L] of every layer, lengths of the queries [Q, L] and of the rows [N,
    L]."""

    cosines: Tensor
    queries: Tensor
    rows: Tensor

    def scores(self, normalize: str) -> Floats:
        """Scores [Q, N] as `dot` has them."""
        cosines, q, n = self.cosines.double(), self.queries.double(), self.rows.double()
        if normalize == "layer":
            return cosines.mean(2).numpy()
        dots = torch.einsum("qnl,ql,nl->qn", cosines, q, n)
        if normalize == "cosine":
            dots = dots / (q.norm(dim=1)[:, None] * n.norm(dim=1)[None]).clamp(min=1e-300)
        return dots.numpy()


def exact_products(
    source: GradientSource, queries: Sequence[Encoded], rows: Sequence[Encoded], say: Any = lambda _: None
) -> Products:
    """Products of the exact gradients of `queries` and `rows`, the points of the path as layers of their own.

    Raises UserError where a parameter that counts is not the weight of a linear layer.
    """
    layers = len(source.targets)
    cosines = torch.zeros(len(queries), len(rows), layers * len(source.points))
    ours, theirs = (torch.zeros(len(texts), cosines.shape[2]) for texts in (queries, rows))

    try:
        for number, point in enumerate(source.points):
            block = slice(number * layers, (number + 1) * layers)
            with source.at(number):
                exact = ExactQueries(factors_of(source, text, number) for text in queries)
                ours[:, block] = exact.lengths.float()
                for n, text in enumerate(rows):
                    for layer, (columns, out) in enumerate(factors_of(source, text, number)):
                        product, length = exact.compare(layer, columns[None], out[None])
                        cosines[:, n, number * layers + layer] = product[:, 0]
                        theirs[n, number * layers + layer] = length[0]
                    if n % 50 == 49:
                        say(f"exact gradients at {point:g}: {n + 1:,} of {len(rows):,} rows")
    except TypeError as error:
        raise UserError(str(error), "make a cache of linear layers' weights alone: see --include") from None
    return Products(cosines, ours, theirs)


def evaluate(subject: Subject, records: Sequence[Any], count: int, *, seed: int = 0) -> Result:
    """How scores from the cache agree with those from exact gradients, on `count` of its rows.

    Raises UserError for a cache whose projection or parameters have no exact counterpart here.
    """
    if len(subject.ensemble.caches) > 1:
        raise UserError("these are several caches", "name one of them")
    cache, source = subject.cache, subject.source
    if source.whole:
        raise UserError("a cache of the rapidgrad projection has no layers to compare", "make another")
    good = (cache.status() == 0).nonzero()[:, 0].numpy()
    if len(good) < 3 or count < 3:
        raise UserError(f"{min(len(good), count)} rows to compare", "at least 3 are needed")
    chosen = np.sort(np.random.default_rng(seed).permutation(good)[:count])
    texts = generations_of(source, list(records))
    encoded = [source.encoder(subject.examples[int(row)]) for row in chosen]
    products = exact_products(source, [text.encoded for text in texts], encoded, subject.say)
    setting = about(subject.ensemble) | {"queries": len(texts), "compared": len(chosen)}
    result = Result("fidelity", setting, COLUMNS)
    sketch = QuerySketch(cache, sketch_generations(source, texts))
    for method, scores, _ in each_score([sketch], texts, [Method("dot", name) for name in NORMALIZE]):
        found, exact = scores[:, chosen], products.scores(method.normalize)
        result.add(
            str(method),
            {
                "spearman": figures.interval(figures.spearman(found, exact)),
                "top10": figures.interval(figures.overlap_at(exact, found, 10)),
            },
        )
    result.notes.append(
        f"{len(texts):,} queries against {len(chosen):,} of {len(cache):,} rows. Top 10 found: share of the "
        "exact scores' best ten that are among the cache's best ten. Intervals: over the queries."
    )
    return result
