"""Normalized vectors against products of the gradients themselves, in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from rapidin.attribution.normalization import (
    NORMALIZE,
    divide,
    products_of_directions,
    query_divisors,
    query_vectors,
    row_divisors,
    row_scales,
    score_divisor,
    squared_directions,
    target_vectors,
    whole_lengths,
)


def by_definition(query: Tensor, row: Tensor, normalize: str) -> float:
    """The score of two gradients [blocks, width] float64; a block or gradient of length 0 has products of
    0."""
    if normalize == "none":
        return float((query * row).sum())
    if normalize == "cosine":
        return float((query * row).sum() / max(1e-300, float(query.norm() * row.norm())))
    cosines = [
        float(q @ r) / max(1e-300, float(q.norm() * r.norm())) for q, r in zip(query, row, strict=True)
    ]
    if normalize == "weighted":
        weights = [float(q.norm()) for q in query]
        mean = sum(w * c for w, c in zip(weights, cosines, strict=True)) / max(1e-300, sum(weights))
        logs = [math.log(float(r.norm())) for r in row if r.any()]
        return mean * math.exp(sum(logs) / len(logs)) ** 0.25 if logs else 0.0
    return sum(cosines) / len(cosines)


def gradients(count: int, seed: int) -> Tensor:
    """Gradients [count, 3 blocks, 16] float32 of very different lengths; block 1 of the first is zero, and
    all of the last."""
    found = torch.randn(count, 3, 16, generator=torch.Generator().manual_seed(seed))
    found *= torch.tensor([1.0, 1e-3, 1e3])[:, None]
    found[0, 1] = 0
    found[-1] = 0
    return found


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_products_are_the_scores(normalize: str) -> None:
    queries, rows = gradients(4, 0), gradients(5, 1)
    lengths = rows.norm(dim=2)
    unit = divide(rows, lengths[:, :, None])
    y = unit * row_scales(lengths, normalize)[:, :, None]
    scores = torch.einsum("qbk,nbk->qn", query_vectors(queries, normalize), y)
    for q, query in enumerate(queries.double()):
        for n, row in enumerate(rows.double()):
            assert float(scores[q, n]) == pytest.approx(
                by_definition(query, row, normalize), rel=1e-4, abs=1e-5
            )
    assert not scores[-1].any()
    assert not scores[:, -1].any()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_vectors_of_targets_sum_to_the_query(normalize: str) -> None:
    queries = gradients(4, 2)
    weights = torch.rand(6, *queries.shape, generator=torch.Generator().manual_seed(3))
    targets = weights / weights.sum(0) * queries
    vectors = torch.stack([target_vectors(some, queries, normalize) for some in targets])
    torch.testing.assert_close(vectors.sum(0), query_vectors(queries, normalize), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_divisors_give_the_scores_of_gradients(normalize: str) -> None:
    """What exact scores use: products of blocks, divided by both lengths."""
    query, row = gradients(3, 4)[1].double(), gradients(3, 5)[1].double()
    products = (query * row).sum(1)
    scale = 1 / (query_divisors(query.norm(dim=1), normalize) * row_divisors(row.norm(dim=1), normalize))
    score = float(products @ scale) / score_divisor(3, normalize)
    assert score == pytest.approx(by_definition(query, row, normalize), rel=1e-12)


def test_small_lengths_stay_in_range() -> None:
    lengths = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    torch.testing.assert_close(whole_lengths(lengths), torch.tensor([[5e-30], [0.0]], dtype=torch.float64))
    torch.testing.assert_close(row_scales(lengths, "cosine"), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert row_scales(lengths, "layer").tolist() == [[1, 1], [0, 0]]
    assert row_scales(lengths, "none") is lengths


@pytest.mark.parametrize("normalize", ["layer", "cosine"])
def test_directions_have_length_1(normalize: str) -> None:
    x = gradients(3, 6)[1:2]
    squares = squared_directions(x, normalize).sum(2)
    totals = products_of_directions(squares, x[0], normalize)
    assert totals.shape == ((1, 1) if normalize == "cosine" else (1, 3))
    torch.testing.assert_close(totals, torch.ones_like(totals))


@pytest.mark.parametrize("normalize", [name for name in NORMALIZE if name != "none"])
def test_a_longer_query_has_the_same_score(normalize: str) -> None:
    """What the errors of lengths are multiplied by: the change of the score if a block of the query gets
    longer is that of its product, less the share that is divided away."""
    query, rows = gradients(3, 7)[1:2].double(), gradients(4, 8)[1:3].double()
    unit = rows * (1 / row_divisors(rows.norm(dim=2), normalize))[:, :, None]
    scores = partial(_scores, unit, normalize)
    products = (query / query_divisors(query.norm(dim=2), normalize)[:, :, None] * unit).sum(2)
    divided = products_of_directions(products, query[0], normalize)
    longer = torch.ones(3, dtype=torch.float64)
    step = 1e-6
    for block in range(3):
        longer[block] = 1 + step
        slope = (scores(query * longer[:, None]) - scores(query)) / step
        longer[block] = 1
        share = squared_directions(query, normalize)[0, block].sum()
        lost = share * divided.expand_as(products)[:, block]
        torch.testing.assert_close(slope, products[:, block] - lost, rtol=1e-4, atol=1e-9)


def _scores(unit: Tensor, normalize: str, query: Tensor) -> Tensor:
    """Of one query, as sums of the products of blocks."""
    return (query / query_divisors(query.norm(dim=2), normalize)[:, :, None] * unit).sum((1, 2))
