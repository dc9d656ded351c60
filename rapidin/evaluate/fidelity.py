"""Do scores from a cache rank as exact gradients, in the cache's geometry, do?

Exact gradients are formed from the factors, ``sum_t g_t a_t^T``, a layer at a time, and compared with the
queries', whose gradients are kept in bfloat16: its rounding, 2^-9 a number, averages out over a layer's
numbers to an error below 1e-4 of a cosine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rapidin.attributor import Attributor
from rapidin.encoding import Encoded
from rapidin.errors import UserError
from rapidin.evaluate import figures
from rapidin.evaluate.methods import Method, each_score
from rapidin.evaluate.result import Result
from rapidin.evaluate.subject import Subject, about
from rapidin.hooks import Batch
from rapidin.query import Part

COLUMNS = {"spearman": "Spearman", "top10": "top 10 found"}
NORMALIZE = ("layer", "cosine", "none")

Factors = list[tuple[Tensor, Tensor]]
Floats = npt.NDArray[np.float64]


def unit_gradients(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``sum_t rows_t columns_t^T`` of length 1 [B, O * I] bfloat16, and their lengths [B] float32.

    columns: [B, T, I]; rows: [B, T, O].
    """
    grads = torch.bmm(rows.float().transpose(1, 2), columns.float()).flatten(1)
    length = grads.norm(dim=1)
    return (grads / length.clamp(min=1e-30)[:, None]).bfloat16(), length


class ExactQueries:
    """The exact gradients of a few queries, one matrix a layer, to compare those of other texts with.

    lengths: [Q, L] float32.
    """

    def __init__(self, factors: Iterator[Factors]) -> None:
        """factors: of each query by itself."""
        kept: list[list[Tensor]] = []
        lengths = []
        for parts in factors:
            made = [unit_gradients(columns, rows) for columns, rows in parts]
            kept = kept or [[] for _ in made]
            for layer, (unit, _) in enumerate(made):
                kept[layer].append(unit)
            lengths.append(torch.stack([length[0] for _, length in made]))
        self._units = [torch.cat(units) for units in kept]
        self.lengths = torch.stack(lengths)

    def compare(self, layer: int, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines [Q, B], lengths [B]) of the gradients of a batch of texts for one layer, float32."""
        unit, length = unit_gradients(columns, rows)
        return (unit @ self._units[layer].T).float().T, length


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
    attributor: Attributor, queries: Sequence[Encoded], rows: Sequence[Encoded], say: Any = lambda _: None
) -> Products:
    """Products of the exact gradients of `queries` and `rows`, the points of the path as layers of their own.

    Raises UserError where a parameter that counts is not the weight of a linear layer.
    """
    layers = len(attributor.targets)
    cosines = torch.zeros(len(queries), len(rows), layers * len(attributor.points))
    ours, theirs = (torch.zeros(len(texts), cosines.shape[2]) for texts in (queries, rows))

    def factors(texts: Sequence[Encoded], number: int) -> Factors:
        batch = Batch.of([(text.ids, text.target) for text in texts], attributor.loaded.device)
        return attributor.sketcher.factors(batch, number)

    try:
        for number, point in enumerate(attributor.points):
            block = slice(number * layers, (number + 1) * layers)
            with attributor.loaded.path.at(point):
                exact = ExactQueries(factors([text], number) for text in queries)
                ours[:, block] = exact.lengths.cpu()
                for n, text in enumerate(rows):
                    for layer, (columns, out) in enumerate(factors([text], number)):
                        product, length = exact.compare(layer, columns, out)
                        cosines[:, n, number * layers + layer] = product[:, 0].cpu()
                        theirs[n, number * layers + layer] = length[0].cpu()
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
    cache, attributor = subject.cache, subject.attributor
    if attributor.projection == "rapidgrad":
        raise UserError("a cache of the rapidgrad projection has no layers to compare", "make another")
    good = (cache.status() == 0).nonzero()[:, 0].numpy()
    if len(good) < 3 or count < 3:
        raise UserError(f"{min(len(good), count)} rows to compare", "at least 3 are needed")
    chosen = np.sort(np.random.default_rng(seed).permutation(good)[:count])
    texts = attributor.generations(list(records))
    encoded = [attributor.encoder(subject.examples[int(row)]) for row in chosen]
    products = exact_products(attributor, [text.encoded for text in texts], encoded, subject.say)
    setting = about(subject.ensemble) | {"queries": len(texts), "compared": len(chosen)}
    result = Result("fidelity", setting, COLUMNS)
    part = Part(cache, attributor.query_sketches(texts))
    for method, scores, _ in each_score([part], texts, [Method("dot", name) for name in NORMALIZE]):
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
