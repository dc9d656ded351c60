"""The candidates of a query: more rows at each end of the ranking than are shown, rescored by a finer cache,
without duplicates, and with the ranks that they could have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rapidin import distributed
from rapidin.attribution.clock import Clock
from rapidin.attribution.duplicates import candidates_for, exact_copies, fold, shingles_of
from rapidin.attribution.fusion import DEPTH
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.scan import Ends, rescore, scan_scored
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.score_errors import details, rank_intervals
from rapidin.attribution.training_data import hits_of
from rapidin.data.examples import Examples
from rapidin.results.types import Hit

MARGIN = 32  # candidates after the last hit that is shown, for the highest ranks that hits could have


@dataclass(frozen=True)
class Candidates:
    """Candidates of all queries.

    ends: best first, as `scan_cache` returns them; copies: for each end, query and row the hit with its
    duplicates, or None if duplicates are not folded; unfolded: the ends before duplicates were folded.
    """

    ends: Ends
    copies: tuple[list[dict[int, Hit]], list[dict[int, Hit]]] | None = None
    unfolded: Ends | None = None

    @property
    def with_duplicates(self) -> Ends:
        """The ends with all duplicates."""
        return self.ends if self.unfolded is None else self.unfolded

    def best(self, count: int) -> Ends:
        """The first `count` at each end."""
        (top, top_rows), (bottom, bottom_rows) = self.ends
        return (top[:, :count], top_rows[:, :count]), (bottom[:, :count], bottom_rows[:, :count])

    def with_copies(self, query: int, end: int, hits: Sequence[Hit]) -> list[Hit]:
        """Hits of one end (0: the top) with the duplicates that are folded into them."""
        if self.copies is None:
            return list(hits)
        known = {**self.copies[1 - end][query], **self.copies[end][query]}
        return [
            replace(hit, copies=known[hit.row].copies, copies_more=known[hit.row].copies_more) for hit in hits
        ]

    def rows(self, query: int, count: int) -> list[int]:
        """The rows among the first `count` at both ends of a query, each once, and one for each set of
        duplicates."""
        rows = {row for _, rows in self.best(count) for row in rows[query].tolist() if row >= 0}
        if self.copies is not None:
            top, bottom = (copies[query] for copies in self.copies)
            folded = {index for hit in top.values() for index in hit.copies}
            rows -= {row for row, hit in bottom.items() if row not in top and hit.index in folded}
        return sorted(rows)


def find_candidates(
    scans: Sequence[CacheScan],
    finer: CacheScan | None,
    options: QueryOptions,
    generations: int,
    data: Examples | None,
    clock: Clock,
    *,
    scored: bool,
) -> tuple[Candidates | None, Tensor | None]:
    """The candidates of all queries in the leading process, None in the others; collective. With `scored`
    also the scores of all rows for the generations [generations, rows].

    finer: rescores the best `options.rescored`; generations: the number of queries that are no targets, which
    come first. If duplicates are folded, the scan is repeated for more rows until enough are left. For `fuse`
    at least `fusion.DEPTH` rows are scanned for.
    """
    world, cache = distributed.world(), scans[0].cache
    shown = max(options.top_k, options.rescored if finer is None else 0)
    if finer is not None:  # it rescores what the user asked for, without a margin
        count = options.rescored
    else:
        count = candidates_for(shown) if options.fold else shown + MARGIN
    candidates: Candidates | None = None
    scores: Tensor | None = None
    while True:
        # Each row that is only ranked costs little, and one that is folded is read.
        most = max(count, DEPTH) if options.fuse and finer is None else count
        found = scan_scored(scans, most, generations if scored else 0)
        ends, scores = found.ends, found.scores if scored else scores
        scored = False  # a repeated scan would find the same scores
        clock.lap("scan")
        if world.leads and finer is not None:
            ends = rescore(finer, ends, count)
            clock.lap("rescore")
        if not options.fold:
            return (Candidates(ends) if world.leads else None), scores
        first = Candidates(ends).best(count)
        if world.leads:
            candidates = replace(folded(scans, first, data), unfolded=ends)
            clock.lap("fold")
        full = [bool((rows[:generations, -1:] >= 0).all()) for _, rows in first]

        def enough(candidates: Candidates | None = candidates, full: list[bool] = full) -> bytes:
            assert candidates is not None
            return bytes([_enough(candidates, full, generations, shown)])

        if count >= len(cache) or world.share(enough)[0]:
            return candidates, scores
        count *= 4


def _enough(candidates: Candidates, full: Sequence[bool], generations: int, shown: int) -> bool:
    """Whether `shown` candidates are left at each end of each generation; full: whether the scan filled the
    end, else there are no more rows."""
    left = ((rows[:generations] >= 0).sum(1) for _, rows in candidates.ends)
    return all(not more or bool((count >= shown).all()) for more, count in zip(full, left, strict=True))


def folded(scans: Sequence[CacheScan], ends: Ends, data: Examples | None) -> Candidates:
    """Candidates without duplicates."""
    cache = scans[0].cache
    every = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    # Queries have hits in common, whose records are read once.
    by_row = {hit.row: hit for hit in hits_of(cache, data, torch.zeros(len(every), device="cpu"), every)}
    exact, shingles = exact_copies(cache, list(by_row)), shingles_of(list(by_row.values()))
    without, copies = [], []
    for scores, rows in ends:
        kept = [
            fold(
                [replace(by_row[row], score=score) for score, row in zip(*pair, strict=True) if row >= 0],
                exact,
                shingles,
            )
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
        longest = max(map(len, kept), default=0)
        left = scores.new_zeros(len(kept), longest), rows.new_full((len(kept), longest), -1)
        for n, hits in enumerate(kept):
            left[0][n, : len(hits)] = torch.tensor([hit.score for hit in hits], device="cpu")
            left[1][n, : len(hits)] = torch.tensor([hit.row for hit in hits], dtype=torch.int64, device="cpu")
        without.append(left)
        copies.append([{hit.row: replace(hit, example=None) for hit in hits} for hits in kept])
    return Candidates((without[0], without[1]), (copies[0], copies[1]))


class RankIntervals:
    """The standard errors of hits, the ranks that they could have, and with `options.layers` the
    contributions of layers."""

    def __init__(
        self, scans: Sequence[CacheScan], candidates: Candidates, generations: int, options: QueryOptions
    ) -> None:
        """generations: the number of queries that are no targets, which come first; the others are left
        out."""
        count = max(options.top_k + MARGIN, options.rescored if options.exact else 0)
        self._ends, self._with_layers = candidates.best(count), options.layers
        rows = torch.cat([rows[:generations] for _, rows in self._ends], 1)
        self._details = details(scans, rows)
        self.layers = self._details.layers if options.layers else ()

    def describe(
        self, query: int, end: int, hits: Sequence[Hit], *, exact: bool = False, fused: bool = False
    ) -> list[Hit]:
        """Hits of one end (0: the top), which are among the first candidates, with their errors and ranks.

        exact: the hits have exact scores, and so another order and no errors; fused: the candidates are in
        the order of a fused ranking, in which errors of scores say nothing of ranks.
        """
        scores, rows = self._ends[end]
        count = int((rows[query] >= 0).sum())
        first = end * self._ends[0][1].shape[1]
        errors = self._details.errors[query, first : first + count].tolist()
        by_layer = self._details.by_layer[query, first : first + count]
        positions = {row: n for n, row in enumerate(rows[query, :count].tolist())}
        sign = -1.0 if end else 1.0
        values = [sign * score for score in scores[query, :count].tolist()]
        intervals = [] if fused else rank_intervals(values, errors)
        described = []
        for hit in hits:
            n = positions.get(hit.row)
            if n is not None and self._with_layers:
                hit = replace(hit, layers=tuple(by_layer[n].tolist()))
            if n is not None and not exact and errors[n] == errors[n]:  # not NaN
                hit = replace(hit, error=errors[n])
                if not fused:
                    ranks = intervals[n].first, intervals[n].last
                    hit = replace(hit, ranks=ranks, tied=intervals[n].tied)
            described.append(hit)
        return described
