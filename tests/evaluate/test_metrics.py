"""Measures against values worked out by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy.stats import spearmanr

from rapidin.errors import UserError
from rapidin.evaluate import metrics

NAN = math.nan
SCORES = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
RELEVANT = [[True, False, True, False]] * 2


def test_figures_by_hand() -> None:
    # Ranks of the relevant rows: 1 and 3; then 2 and 4.
    assert metrics.auprc(SCORES, RELEVANT) == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])
    assert metrics.auroc(SCORES, RELEVANT) == pytest.approx([3 / 4, 1 / 4])
    assert metrics.precision_at(SCORES, RELEVANT, 1) == pytest.approx([1, 0])
    assert metrics.precision_at(SCORES, RELEVANT, 3) == pytest.approx([2 / 3, 1 / 3])
    assert metrics.precision_at(SCORES, RELEVANT, 50) == pytest.approx([1 / 2, 1 / 2])
    assert metrics.recall_at(SCORES, RELEVANT, 2) == pytest.approx([1 / 2, 1 / 2])
    assert metrics.recall_at(SCORES, RELEVANT, 50) == pytest.approx([1, 1])
    assert metrics.reciprocal_rank(SCORES, RELEVANT) == pytest.approx([1, 1 / 2])


def test_ties_share_their_places_and_nan_is_last() -> None:
    assert metrics.ranks([5.0, 1.0, 1.0, NAN]).tolist() == [1, 2.5, 2.5, 4]
    tied = [[1.0, 1.0, 1.0, NAN]]
    first, last = [[True, False, False, False]], [[False, False, False, True]]
    assert metrics.precision_at(tied, first, 1) == pytest.approx([1 / 3])
    assert metrics.precision_at(tied, first, 2) == pytest.approx([1 / 3])
    assert metrics.recall_at(tied, first, 2) == pytest.approx([2 / 3])
    assert metrics.reciprocal_rank(tied, first) == pytest.approx([1 / 2])
    assert metrics.auroc(tied, last) == pytest.approx([0])
    assert metrics.auroc([[2.0, 2.0]], [[True, False]]) == pytest.approx([1 / 2])


def test_no_value_where_nothing_is_relevant() -> None:
    for measure in (metrics.auprc, metrics.auroc, metrics.reciprocal_rank):
        assert math.isnan(measure([[1.0, 2.0]], [[False, False]])[0])
    found = metrics.estimate([NAN, 1.0, 3.0])
    assert (found.mean, found.queries) == (2.0, 2)


def test_spearman_and_overlap() -> None:
    a, b = [[1.0, 2.0, 3.0, 4.0]], [[10.0, 30.0, 20.0, 40.0]]
    assert metrics.spearman(a, b) == pytest.approx([1 - 6 * 2 / (4 * 15)])
    assert metrics.spearman(a, [[1.0, 1.0, 1.0, 1.0]]) == pytest.approx([0])
    assert metrics.spearman(a, [[4.0, 3.0, 2.0, 1.0]]) == pytest.approx([-1])
    assert metrics.overlap_at(a, b, 2) == pytest.approx([1 / 2])
    assert metrics.overlap_at(a, b, 9) == pytest.approx([1])


def test_intervals_hold_the_mean_repeat_and_narrow() -> None:
    rng = np.random.default_rng(0)
    few, many = metrics.estimate(rng.normal(size=20)), metrics.estimate(rng.normal(size=2000))
    assert few == metrics.estimate(np.random.default_rng(0).normal(size=20))
    for found in (few, many):
        assert found.low < found.mean < found.high
    # About 1.96 standard errors to each side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * many.sd / 2000**0.5, rel=0.1)
    assert few.high - few.low > 4 * (many.high - many.low)
    one = metrics.estimate([0.5])
    assert one.mean == 0.5
    assert one.to_json() == {"mean": 0.5, "low": None, "high": None, "sd": None, "queries": 1}


def test_over_rows() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(300) < 0.3
    scores = np.round(truth + rng.normal(size=300), 1)  # with ties
    roc, prc = metrics.estimate_over_rows(scores, truth)
    assert roc.low < roc.mean < roc.high
    assert roc.mean == pytest.approx(0.76, abs=0.06)  # P(N(1, 2) > 0)
    assert roc.high - roc.low < 0.15
    assert prc.low < prc.mean < prc.high
    assert metrics.estimate_over_rows(scores, truth) == (roc, prc)
    assert math.isnan(metrics.estimate_over_rows(scores, truth & False)[0].mean)


def test_weighted_rankings_are_scikit_learns_on_repeated_rows() -> None:
    rng = np.random.default_rng(2)
    scores, truth = rng.integers(6, size=20).astype(float), rng.random(20) < 0.4
    scores[3] = NAN
    times = rng.integers(4, size=(5, 20))
    roc, prc = metrics._resampled(scores, truth, times)
    for n, each in enumerate(times):
        rows = np.repeat(np.arange(20), each)
        assert roc[n] == pytest.approx(metrics.auroc(scores[rows], truth[rows])[0])
        assert prc[n] == pytest.approx(metrics.auprc(scores[rows], truth[rows])[0])


def test_missing_packages_are_named() -> None:
    code = (
        "import sys; sys.modules['sklearn.metrics'] = None\n"
        "from rapidin.errors import UserError\n"
        "from rapidin.evaluate import metrics\n"
        "try: metrics.auroc([[1.0, 2.0]], [[True, False]])\n"
        "except UserError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "'rapidin eval' needs the package scikit-learn; pip install 'rapidin[eval]'\n"
    with pytest.raises(UserError, match="rapidin\\[eval\\]"):
        metrics.needs("no_such_module_at_all")


def test_spearman_is_scipys_and_knows_ties_and_constants() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, (4, 30)).astype(float), rng.normal(size=(4, 30))
    expected = [spearmanr(first, second).statistic for first, second in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.spearman(a, b), expected, atol=1e-12)
    assert metrics.spearman(np.ones((1, 30)), b[:1]) == 0
