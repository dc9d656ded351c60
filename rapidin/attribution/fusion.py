"""One ranking of three: gradient scores, BM25 of the words, and similarity of the model's hidden states.

Reciprocal rank fusion (Cormack, Clarke and Büttcher, *Reciprocal rank fusion outperforms Condorcet and
individual rank learning methods*, SIGIR 2009): a row's score is the sum of w_i / (60 + rank_i) over the
rankings. Only ranks are compared, so the rankings need no common scale.

Of each ranking the best `DEPTH` rows have a rank, so that a query of a large cache reads few rows again; from
any other row the ranking adds nothing. Equal scores share the best rank of theirs. A row without a word of
the query has no rank by BM25, whatever the size of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rapidin.attribution.baselines import STATES, WORDS, Bools, Floats
from rapidin.results.fusion import BEST, Fused, Fusion

CONSTANT = 60  # added to ranks, as in the paper, which fixed it in a pilot study
DEPTH = 1000
GRADIENTS = "gradients"
RANKINGS = (GRADIENTS, WORDS, STATES)
EQUAL = (1.0, 1.0, 1.0)
MOST_READ = 10_000  # rows of a cache up to which the model reads the text of each


@dataclass(frozen=True)
class FusedRows:
    """The fused ranking of one generation: its rows, best first, what is known of each, and of all."""

    rows: list[int]
    by_row: dict[int, Fused]
    fusion: Fusion


def ranks_of(rows: Sequence[int], scores: Sequence[float]) -> dict[int, int]:
    """The ranks from 1 of rows in descending order of their scores; equal scores share the best rank."""
    ranks: dict[int, int] = {}
    rank, previous = 1, None
    for n, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
        rank = rank if score == previous else n
        ranks[row], previous = rank, score
    return ranks


def best_rows(scores: Floats, counted: Bools, depth: int = DEPTH, *, nonzero: bool = False) -> dict[int, int]:
    """The ranks of the best `depth` rows among scores [rows]; of equal scores at the end the first rows.

    counted: [rows], the rows that have a rank at all, if their scores are finite and, with nonzero, not 0: as
    those of BM25 are for rows without a word of the query. (Words of most rows may have negative scores.)
    """
    usable = counted & np.isfinite(scores) & ((scores != 0) if nonzero else True)
    rows = np.flatnonzero(usable)
    rows = rows[np.argsort(-scores[rows], kind="stable")][:depth]
    return ranks_of(rows.tolist(), scores[rows].tolist())


def fuse(
    rankings: Mapping[str, Mapping[int, int]], weights: Sequence[float] = EQUAL, depth: int = DEPTH
) -> FusedRows:
    """The fused ranking of all rows that have a rank in one of the rankings that weigh something.

    rankings: ranks by row, by the name of a ranking: those of `RANKINGS`, in their order; weights: of each.
    Of equal fused scores the row with the better rank by gradients comes first, then the lower row.
    """
    weighted = dict(zip(rankings, weights, strict=True))
    rows = {row for name, ranks in rankings.items() if weighted[name] for row in ranks}
    by_row = {}
    for row in rows:
        ranks = {name: of.get(row) for name, of in rankings.items()}
        adds = {
            name: 0.0 if rank is None else weighted[name] / (CONSTANT + rank) for name, rank in ranks.items()
        }
        by_row[row] = Fused(sum(adds.values()), ranks, adds)
    last = depth + 1

    def order(row: int) -> tuple[float, int, int]:
        return -by_row[row].score, by_row[row].ranks[GRADIENTS] or last, row

    by_gradients, by_words = rankings[GRADIENTS], rankings[WORDS]
    best = sorted(by_gradients, key=lambda row: (by_gradients[row], row))[:BEST]
    common = sum(by_words.get(row, last) <= len(best) for row in best)
    return FusedRows(sorted(rows, key=order), by_row, Fusion(weighted, depth, common, len(best)))


def read_rows(gradients: Tensor, counted: Bools, words: Floats, most: int = MOST_READ) -> Bools:
    """The rows [rows] whose texts the model reads: all that count if they are at most `most`, else those that
    gradients or BM25 rank among their best for one of the queries.

    gradients: [Q, k] rows, below 0 for none; counted: [rows]; words: [Q, rows] scores of BM25.
    """
    if int(counted.sum()) <= most:
        return counted
    read = np.zeros_like(counted)
    chosen = torch.unique(gradients[gradients >= 0])
    read[chosen[chosen < len(read)].numpy()] = True
    for scores in words:
        read[list(best_rows(scores, counted, nonzero=True))] = True
    return read & counted
