"""Measures of a ranking, each with a bootstrap interval over the queries.

A ranking comes as scores, higher first. Equal scores share the mean of their places, so no figure depends on
the order in which rows happen to lie; NaN, a row without a sketch, ranks last. scikit-learn and scipy do the
work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rapidin import errors

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95


def needs(module: str) -> Any:
    """A module of the extra `eval`; UserError where it is not installed."""
    return errors.needs(module, "'rapidin eval'", "eval")


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over queries, its 95% bootstrap interval, and the standard deviation over the queries.

    The interval is NaN where there are fewer than two queries; queries that have no value (NaN) are left out.
    """

    mean: float
    low: float
    high: float
    sd: float
    queries: int

    def to_json(self) -> dict[str, float | int | None]:
        """All of it; what is no number becomes null."""
        values = {"mean": self.mean, "low": self.low, "high": self.high, "sd": self.sd}
        return {k: v if math.isfinite(v) else None for k, v in values.items()} | {"queries": self.queries}


def interval(values: Iterable[float], *, seed: int = 0) -> Figure:
    """The mean of one value a query, with the percentile bootstrap's interval (Efron, 1979), seeded."""
    stats = needs("scipy.stats")
    found = np.array([v for v in values if not math.isnan(v)], dtype=np.float64)
    if len(found) < 2:
        mean = float(found[0]) if len(found) else math.nan
        return Figure(mean, math.nan, math.nan, math.nan, len(found))
    made = stats.bootstrap(
        (found,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Figure(float(found.mean()), float(made.low), float(made.high), float(found.std()), len(found))


def places(scores: npt.ArrayLike) -> Floats:
    """Places from 1 along the last axis, highest score first; equal scores share their mean place."""
    values = np.asarray(scores, dtype=np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    made: Floats = needs("scipy.stats").rankdata(-values, method="average", axis=-1)
    return made


def auprc(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """Average precision of each query: [Q, N], [Q, N] -> [Q]; NaN where nothing, or everything, is
    relevant."""
    return _each("average_precision_score", scores, relevant)


def auroc(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """Area under the ROC curve of each query: [Q, N], [Q, N] -> [Q]; NaN where it has none."""
    return _each("roc_auc_score", scores, relevant)


def _each(name: str, scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    measure = getattr(needs("sklearn.metrics"), name)
    ranked, truth = _pairs(scores, relevant)
    return np.array(
        [measure(t, -p) if t.any() and not t.all() else math.nan for p, t in zip(ranked, truth, strict=True)]
    )


def precision_at(scores: npt.ArrayLike, relevant: npt.ArrayLike, k: int) -> Floats:
    """Share of relevant rows among the first min(k, N): [Q, N], [Q, N] -> [Q].

    Where equal scores lie across the cut, what a random order of them would give on average.
    """
    ranked, truth = _pairs(scores, relevant)
    return np.array([_among(p, t, k) / min(k, len(p)) for p, t in zip(ranked, truth, strict=True)])


def recall_at(scores: npt.ArrayLike, relevant: npt.ArrayLike, k: int) -> Floats:
    """Share of the relevant rows that are among the first k: [Q, N], [Q, N] -> [Q]; ties as in
    `precision_at`; NaN where nothing is relevant."""
    ranked, truth = _pairs(scores, relevant)
    return np.array(
        [_among(p, t, k) / t.sum() if t.any() else math.nan for p, t in zip(ranked, truth, strict=True)]
    )


def _among(ranked: Floats, truth: npt.NDArray[np.bool_], k: int) -> float:
    """How many relevant rows are expected among the first k."""
    total, start = 0.0, 0
    for _, size, good in _ties(ranked, truth):
        room = min(size, k - start)
        if room <= 0:
            break
        total += good * room / size
        start += size
    return total


def _ties(ranked: Floats, truth: npt.NDArray[np.bool_]) -> list[tuple[float, int, int]]:
    """(place, rows, relevant rows) of each group of equal scores, in order."""
    where, inverse, sizes = np.unique(ranked, return_inverse=True, return_counts=True)
    good = np.bincount(inverse, weights=truth, minlength=len(where))
    return [(float(w), int(s), int(g)) for w, s, g in zip(where, sizes, good, strict=True)]


def reciprocal_rank(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> Floats:
    """1 over the place of the first relevant row: [Q, N], [Q, N] -> [Q]; their mean is the MRR."""
    ranked, truth = _pairs(scores, relevant)
    return np.array([1.0 / p[t].min() if t.any() else math.nan for p, t in zip(ranked, truth, strict=True)])


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Spearman's correlation of each row of a [Q, N] with the same row of b; 0 where a row is constant."""
    rankdata = needs("scipy.stats").rankdata
    first, second = (rankdata(np.atleast_2d(np.asarray(x, np.float64)), axis=1) for x in (a, b))
    first, second = first - first.mean(1, keepdims=True), second - second.mean(1, keepdims=True)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    made: Floats = np.divide((first * second).sum(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return made


def overlap_at(a: npt.ArrayLike, b: npt.ArrayLike, k: int) -> Floats:
    """Share of the k highest of a [Q, N] that are among the k highest of b, row by row."""
    top = [np.argsort(-np.asarray(x, np.float64), axis=1, kind="stable")[:, :k] for x in (a, b)]
    return np.array(
        [len(set(x) & set(y)) / len(x) for x, y in zip(top[0].tolist(), top[1].tolist(), strict=True)]
    )


def over_rows(scores: npt.ArrayLike, relevant: npt.ArrayLike, *, seed: int = 0) -> tuple[Figure, Figure]:
    """(auROC, auPRC) of one ranking [N], with the percentile bootstrap's intervals over its rows."""
    values, truth = np.asarray(scores, np.float64), np.asarray(relevant, bool)
    rng, n = np.random.default_rng(seed), len(values)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each row is drawn
    found = []
    for measure, made in zip((auroc, auprc), _weighted(values, truth, drawn), strict=True):
        mean, kept = float(measure(values, truth)[0]), made[~np.isnan(made)]
        if math.isnan(mean) or not len(kept):
            found.append(Figure(mean, math.nan, math.nan, math.nan, 1))
            continue
        low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found.append(Figure(mean, float(low), float(high), float(kept.std()), 1))
    return found[0], found[1]


def _weighted(
    values: Floats, truth: npt.NDArray[np.bool_], weights: npt.NDArray[Any]
) -> tuple[Floats, Floats]:
    """(auROC [R], average precision [R]) of one ranking [N] whose rows count `weights` [R, N] times.

    All resamples at once, where a call of scikit-learn each would take minutes.
    """
    ranked = places(values)
    order = np.argsort(ranked, kind="stable")
    starts = np.flatnonzero(np.diff(ranked[order], prepend=-1.0))  # a group of equal scores each
    w, t = weights[:, order].astype(np.float64), truth[order]
    good, bad = (np.add.reduceat(w * side, starts, axis=1) for side in (t, ~t))
    all_good, all_bad = good.sum(1), bad.sum(1)
    above_good, above_bad = good.cumsum(1), bad.cumsum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = all_bad[:, None] - above_bad + bad / 2
        roc = (good * below).sum(1) / (all_good * all_bad)
        precision = np.nan_to_num(above_good / (above_good + above_bad))
        prc = np.where(all_bad > 0, (good * precision).sum(1) / all_good, np.nan)
    return roc, prc


def _pairs(scores: npt.ArrayLike, relevant: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.bool_]]:
    ranked = np.atleast_2d(places(scores))
    return ranked, np.broadcast_to(np.asarray(relevant, dtype=bool), ranked.shape)
