"""The verdict on each query: its best score among those of the cache's null distribution.

If m of the n best scores of the null are at or above a query's, the chance of a query that is like the texts
of the null to come so far up is at most (m + 1) / (n + 1), as in any permutation test;
`rapidin.results.verdict` has the limits below which a verdict is strong or weak. The texts are neutral
questions, or training rows where there are no questions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from rapidin.attribution.methods.vectors import known_normalization
from rapidin.attribution.null_scores import gradient_lengths
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.query_sketch import QuerySketch
from rapidin.results.verdict import STRONG, WEAK, Place, Strength, Verdict


def verdicts(sketches: Sequence[QuerySketch], options: QueryOptions, best: Tensor) -> list[Verdict | None]:
    """The verdict on each query; None for all if a cache has no null distribution, and for a query without a
    score.

    sketches: of the queries, for each cache that gives their scores; best: the best score of each query [Q].
    """
    null = sketches[0].cache.manifest.null
    if null is None or any(each.cache.manifest.null is None for each in sketches):
        return [None] * len(best)
    reason = _why_none(sketches, options)
    if reason:
        return [Verdict("unknown", reason=reason)] * len(best)
    (sketch,) = sketches
    normalize = known_normalization(sketch.cache, options.normalize)
    sizes = gradient_lengths(sketch.sketch[: len(best)], normalize) * sketch.weight
    return [
        None if score != score else _verdict(score, {name: of[normalize] for name, of in null.items()})
        for score in (best / sizes.cpu()).tolist()
    ]


def _why_none(sketches: Sequence[QuerySketch], options: QueryOptions) -> str:
    """Why the null distribution does not apply to these scores; "" if it does."""
    if len(sketches) > 1:
        return "the caches' null distributions are of each cache alone"
    if options.together:
        return "the null distribution is of single generations"
    if options.method != "dot":
        return "the null distribution is of the method dot"
    null = sketches[0].cache.manifest.null or {}
    normalize = known_normalization(sketches[0].cache, options.normalize)
    if any(normalize not in of for of in null.values()):
        return (
            f"the null distribution has no scores for the normalization {normalize}; rerunning the "
            "'rapidin cache' of this cache adds them, and older ones are there for 'layer'"
        )
    return ""


def _verdict(score: float, null: dict[str, list[float]]) -> Verdict:
    """The verdict on a score; null: the best scores of each set, ascending."""
    places = {name: Place(tuple(scores), bisect_left(scores, score)) for name, scores in null.items()}
    questions, rows = places.get("questions"), places.get("rows")
    deciding = questions or rows
    assert deciding is not None
    chance = deciding.chance
    strength: Strength = "strong" if chance <= STRONG else "weak" if chance <= WEAK else "nothing"
    return Verdict(strength, score, questions, rows)
