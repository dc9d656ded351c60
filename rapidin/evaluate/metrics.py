"""Metrics of a ranking, each with a bootstrap confidence interval over the queries.

A ranking is given as scores, higher first. Equal scores share their mean rank, so no metric depends on the
order of the rows; NaN, a row without a sketch, ranks last. scikit-learn and scipy compute what they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin import errors

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 2000
LEVEL = 0.95
REQUIRED_PACKAGES = ("sklearn", "scipy", "rank_bm25")


def needs(module: str) -> Any:
    """Import a module of the extra `eval`. Raises UserError if it is not installed."""
    return errors.needs(module, "'rapidin eval'", "eval")


# ------------------------------------------------------------------------------------------ estimates


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries, its 95% bootstrap interval, and the standard deviation over the queries.

    low, high: NaN for fewer than two queries; queries: number of those with a value (queries without one,
    NaN, are left out).
    """

    mean: float
    low: float
    high: float
    sd: float
    queries: int

    def to_json(self) -> dict[str, float | int | None]:
        """All fields as a JSON object; null for NaN."""
        values = {"mean": self.mean, "low": self.low, "high": self.high, "sd": self.sd}
        return {k: v if math.isfinite(v) else None for k, v in values.items()} | {"queries": self.queries}


def estimate(values: Iterable[float], *, seed: int = 0) -> Estimate:
    """The mean of one value per query, with the seeded percentile bootstrap's interval (Efron, 1979)."""
    stats = needs("scipy.stats")
    defined = np.array([v for v in values if not math.isnan(v)], dtype=np.float64)
    if len(defined) < 2:
        mean = float(defined[0]) if len(defined) else math.nan
        return Estimate(mean, math.nan, math.nan, math.nan, len(defined))
    interval = stats.bootstrap(
        (defined,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(
        float(defined.mean()), float(interval.low), float(interval.high), float(defined.std()), len(defined)
    )


def estimate_over_rows(
    scores: npt.ArrayLike, relevant: npt.ArrayLike, *, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """(auROC, auPRC) of one ranking [N], with the percentile bootstrap's intervals over its rows."""
    values, truth = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    rng, n = np.random.default_rng(seed), len(values)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each row is drawn
    estimates = []
    for metric, resampled in zip((auroc, auprc), _resampled(values, truth, counts), strict=True):
        mean, defined = float(metric(values, truth)[0]), resampled[~np.isnan(resampled)]
        if math.isnan(mean) or not len(defined):
            estimates.append(Estimate(mean, math.nan, math.nan, math.nan, 1))
            continue
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        estimates.append(Estimate(mean, float(low), float(high), float(defined.std()), 1))
    return estimates[0], estimates[1]


def _resampled(values: Floats, truth: Bools, counts: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """(auROC [R], average precision [R]) of one ranking [N], each row taken `counts` [R, N] times.

    All resamples at once: a call of scikit-learn for each would take minutes.
    """
    ranked = ranks(values)
    order = np.argsort(ranked, kind="stable")
    starts = np.flatnonzero(np.diff(ranked[order], prepend=-1.0))  # of each group of equal scores
    weights, relevant = counts[:, order].astype(np.float64), truth[order]
    good, bad = (np.add.reduceat(weights * side, starts, axis=1) for side in (relevant, ~relevant))
    all_good, all_bad = good.sum(1), bad.sum(1)
    above_good, above_bad = good.cumsum(1), bad.cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = all_bad[:, None] - above_bad + bad / 2
        roc = (good * below).sum(1) / (all_good * all_bad)
        precision = np.nan_to_num(above_good / (above_good + above_bad))
        prc = np.where(all_bad > 0, (good * precision).sum(1) / all_good, np.nan)
    return roc, prc


# -------------------------------------------------------------------------------------------- metrics


def ranks(scores: npt.ArrayLike) -> Floats:
    """Ranks from 1 along the last axis, highest score first; equal scores share their mean rank."""
    values = np.asarray(scores, dtype=np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    ranked: Floats = needs("scipy.stats").rankdata(-values, method="average", axis=-1)
    return ranked


def auprc(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """Average precision of each query: [Q, N], [Q, N] -> [Q]; NaN if no row, or every row, is relevant."""
    return _scikit_learn("average_precision_score", scores, relevant)


def auroc(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """Area under the ROC curve of each query: [Q, N], [Q, N] -> [Q]; NaN where it is undefined."""
    return _scikit_learn("roc_auc_score", scores, relevant)


def _scikit_learn(name: str, scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    metric = getattr(needs("sklearn.metrics"), name)
    ranked, truth = _ranks_and_truth(scores, relevant)
    return np.array(
        [metric(t, -r) if t.any() and not t.all() else math.nan for r, t in zip(ranked, truth, strict=True)]
    )


def precision_at(scores: npt.ArrayLike, relevant: npt.ArrayLike, k: int) -> Floats:
    """Share of relevant rows among the first min(k, N): [Q, N], [Q, N] -> [Q].

    Where the cut divides equal scores: the expected value over their random orders.
    """
    ranked, truth = _ranks_and_truth(scores, relevant)
    return np.array([_expected_hits(r, t, k) / min(k, len(r)) for r, t in zip(ranked, truth, strict=True)])


def recall_at(scores: npt.ArrayLike, relevant: npt.ArrayLike, k: int) -> Floats:
    """Share of the relevant rows that are among the first k: [Q, N], [Q, N] -> [Q].

    Equal scores as in `precision_at`; NaN if no row is relevant.
    """
    ranked, truth = _ranks_and_truth(scores, relevant)
    return np.array(
        [
            _expected_hits(r, t, k) / t.sum() if t.any() else math.nan
            for r, t in zip(ranked, truth, strict=True)
        ]
    )


def _expected_hits(ranked: Floats, truth: Bools, k: int) -> float:
    """Expected number of relevant rows among the first k, over the random orders of equal scores."""
    _, inverse, sizes = np.unique(ranked, return_inverse=True, return_counts=True)
    relevant = np.bincount(inverse, weights=truth, minlength=len(sizes))
    expected, start = 0.0, 0
    for size, hits in zip(sizes.tolist(), relevant.tolist(), strict=True):  # groups of equal scores, in order
        taken = min(size, k - start)
        if taken <= 0:
            break
        expected += hits * taken / size
        start += size
    return expected


def reciprocal_rank(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """1 / rank of the first relevant row: [Q, N], [Q, N] -> [Q]; their mean is the MRR."""
    ranked, truth = _ranks_and_truth(scores, relevant)
    return np.array([1.0 / r[t].min() if t.any() else math.nan for r, t in zip(ranked, truth, strict=True)])


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Spearman's correlation of each row of a [Q, N] with the same row of b; 0 if a row is constant."""
    rankdata = needs("scipy.stats").rankdata
    first, second = (rankdata(np.atleast_2d(np.asarray(x, np.float64)), axis=1) for x in (a, b))
    first, second = first - first.mean(1, keepdims=True), second - second.mean(1, keepdims=True)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    correlation: Floats = np.divide((first * second).sum(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return correlation


def overlap_at(a: npt.ArrayLike, b: npt.ArrayLike, k: int) -> Floats:
    """Share of the k highest of each row of a [Q, N] that are among the k highest of the same row of b."""
    top = [np.argsort(-np.asarray(x, np.float64), axis=1, kind="stable")[:, :k] for x in (a, b)]
    return np.array(
        [len(set(x) & set(y)) / len(x) for x, y in zip(top[0].tolist(), top[1].tolist(), strict=True)]
    )


def _ranks_and_truth(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> tuple[Floats, Bools]:
    ranked = np.atleast_2d(ranks(scores))
    return ranked, np.broadcast_to(np.asarray(relevant, dtype=bool), ranked.shape)
