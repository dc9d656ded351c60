"""Reciprocal rank fusion: ranks, what each adds, and which texts the model reads of a large cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rapidin.attribution import fusion
from rapidin.attribution.fusion import GRADIENTS, RANKINGS, best_rows, fuse, ranks_of, read_rows

ALL = np.ones(6, dtype=np.bool_)


def test_equal_scores_share_the_best_rank() -> None:
    assert ranks_of([4, 2, 7, 1], [3.0, 1.0, 1.0, 0.5]) == {4: 1, 2: 2, 7: 2, 1: 4}
    assert ranks_of([], []) == {}


def test_the_best_rows_have_ranks() -> None:
    scores = np.array([0.5, -1.0, 2.0, 0.0, np.nan, 2.0])
    assert best_rows(scores, ALL) == {2: 1, 5: 1, 0: 3, 3: 4, 1: 5}
    assert best_rows(scores, ALL, depth=1) == {2: 1}
    assert best_rows(scores, ALL, nonzero=True) == {2: 1, 5: 1, 0: 3, 1: 4}
    assert best_rows(scores, np.array([1, 1, 0, 1, 1, 1], dtype=np.bool_)) == {5: 1, 0: 2, 3: 3, 1: 4}


def test_a_fused_score_is_the_sum_of_weighted_reciprocal_ranks() -> None:
    """Cormack et al., SIGIR 2009, equation 1, with k = 60."""
    ranks = [{0: 1, 1: 2, 2: 3}, {2: 1, 3: 2}, {3: 1, 0: 1}]
    rankings = dict(zip(RANKINGS, ranks, strict=True))
    found = fuse(rankings)
    want = {0: 1 / 61 + 1 / 61, 1: 1 / 62, 2: 1 / 63 + 1 / 61, 3: 1 / 62 + 1 / 61}
    assert {row: of.score for row, of in found.by_row.items()} == pytest.approx(want)
    assert found.rows == [0, 3, 2, 1]
    assert found.by_row[3].ranks == {"gradients": None, "BM25": 2, "hidden states": 1}
    assert found.by_row[3].adds == pytest.approx({"gradients": 0, "BM25": 1 / 62, "hidden states": 1 / 61})
    assert found.by_row[3].share("BM25") == pytest.approx(61 / 123)
    weighted = fuse(rankings, (1, 0.5, 0))
    assert weighted.by_row[2].score == pytest.approx(1 / 63 + 0.5 / 61)
    assert weighted.rows == [2, 0, 1, 3]
    assert fuse(rankings, (0, 1, 0)).rows == [2, 3]  # the others have no rank in what weighs something
    assert weighted.fusion.weights == {"gradients": 1, "BM25": 0.5, "hidden states": 0}


def test_of_equal_sums_the_gradients_decide_then_the_row() -> None:
    rankings = dict(zip(RANKINGS, [{5: 1, 6: 2, 8: 2}, {6: 1, 5: 2, 8: 1}, {}], strict=True))
    assert fuse(rankings).rows == [5, 6, 8]
    rankings[GRADIENTS] = {6: 1, 5: 2, 8: 2}
    rankings["BM25"] = {5: 1, 6: 2, 8: 1}
    assert fuse(rankings).rows == [6, 5, 8]


def test_the_best_of_gradients_are_counted_among_those_of_words() -> None:
    by_gradients = {row: row + 1 for row in range(30)}
    for shift in (0, 1, 4, 10):
        by_words = {row + shift: row + 1 for row in range(30)}
        found = fuse(dict(zip(RANKINGS, (by_gradients, by_words, {}), strict=True))).fusion
        assert (found.common, found.best) == (10 - shift, 10)
        assert found.only_words == (shift <= 1)
    few = fuse(dict(zip(RANKINGS, ({1: 1, 2: 2}, {2: 1, 9: 2}, {}), strict=True))).fusion
    assert (few.common, few.best, few.only_words) == (1, 2, False)


def test_of_a_large_cache_the_model_reads_the_best_of_the_other_rankings() -> None:
    counted = np.array([1, 1, 1, 1, 0, 1], dtype=np.bool_)
    words = np.array([[0.0, 0.0, 3.0, 0.0, 2.0, 0.0]])
    gradients = torch.tensor([[0, 4, -1]])
    assert read_rows(gradients, counted, words, most=5).tolist() == counted.tolist()
    assert np.flatnonzero(read_rows(gradients, counted, words, most=4)).tolist() == [0, 2]
    assert fusion.DEPTH < fusion.MOST_READ
