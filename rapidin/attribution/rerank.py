"""The candidates of a query: more rows at each end of the ranking than are shown, folded and rescored, and
the
ranks that they could have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rapidin.attribution.clock import Clock
from rapidin.attribution.duplicates import exact_copies, fold, shingles_of, wanted_for
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.scan import Ends, rescore, scan_cache
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.score_errors import Details, details, places
from rapidin.attribution.training_data import hits_of
from rapidin.data.examples import Examples
from rapidin.distributed import world
from rapidin.results.types import Hit

MARGIN = 32  # candidates after the last hit shown that its last rank is counted among


@dataclass(frozen=True)
class Candidates:
    """ends: of all queries, best first, as `scan_cache` gives them; copies: of both ends by query and row,
    what is folded into a hit."""

    ends: Ends
    copies: tuple[list[dict[int, Hit]], list[dict[int, Hit]]] | None = None

    def best(self, count: int) -> Ends:
        """The first so many at each end."""
        (top, top_rows), (bottom, bottom_rows) = self.ends
        return (top[:, :count], top_rows[:, :count]), (bottom[:, :count], bottom_rows[:, :count])

    def with_copies(self, query: int, end: int, hits: Sequence[Hit]) -> list[Hit]:
        """Hits of one end (0: the top) with what is folded into them."""
        if self.copies is None:
            return list(hits)
        known = {**self.copies[1 - end][query], **self.copies[end][query]}
        return [
            replace(hit, copies=known[hit.row].copies, copies_more=known[hit.row].copies_more) for hit in hits
        ]

    def rows(self, query: int, count: int) -> list[int]:
        """The rows among the first so many at both ends of a query, each once, and of those that say the same
        one."""
        found = {row for _, rows in self.best(count) for row in rows[query].tolist() if row >= 0}
        if self.copies is not None:
            top, bottom = (copies[query] for copies in self.copies)
            folded = {index for hit in top.values() for index in hit.copies}
            found -= {row for row, hit in bottom.items() if row not in top and hit.index in folded}
        return sorted(found)


def find_candidates(
    scanned: Sequence[CacheScan],
    finer: CacheScan | None,
    options: QueryOptions,
    generations: int,
    data: Examples | None,
    clock: Clock,
) -> Candidates | None:
    """The candidates of all queries; of several processes, which all call this, for the leader alone.

    finer: what the best `options.rescored` are chosen by; generations: how many queries, the first ones, are
    no targets. If hits are folded, the scan is repeated for more until enough of them are left.
    """
    here, cache = world(), scanned[0].cache
    shown = max(options.top_k, options.rescored if finer is None else 0)
    # What a finer cache chooses from is what was asked for, no more.
    looked = options.rescored if finer is not None else wanted_for(shown) if options.fold else shown + MARGIN
    found: Candidates | None = None
    while True:
        ends = scan_cache(scanned, looked)
        clock.lap("scan")
        if here.leads and finer is not None:
            ends = rescore(finer, ends, looked)
            clock.lap("rescore")
        if not options.fold:
            return Candidates(ends) if here.leads else None
        if here.leads:
            found = _folded(scanned, ends, data)
            clock.lap("fold")
        full = [bool((rows[:generations, -1:] >= 0).all()) for _, rows in ends]

        def enough(found: Candidates | None = found, full: list[bool] = full) -> bytes:
            assert found is not None
            return bytes([_enough(found, full, generations, shown)])

        if looked >= len(cache) or here.share(enough)[0]:
            return found
        looked *= 4


def _enough(found: Candidates, full: Sequence[bool], generations: int, shown: int) -> bool:
    """Whether so many are left at each end of each generation; an end that the scan could not fill has all
    that there are."""
    left = ((rows[:generations] >= 0).sum(1) for _, rows in found.ends)
    return all(not more or bool((count >= shown).all()) for more, count in zip(full, left, strict=True))


def _folded(scanned: Sequence[CacheScan], ends: Ends, data: Examples | None) -> Candidates:
    cache = scanned[0].cache
    every = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    # Queries have hits in common, whose records are read once.
    known = {hit.row: hit for hit in hits_of(cache, data, torch.zeros(len(every), device="cpu"), every)}
    exact, said = exact_copies(cache, list(known)), shingles_of(list(known.values()))
    made, copies = [], []
    for scores, rows in ends:
        hits = []
        for own_scores, own_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            found = [
                replace(known[row], score=score)
                for score, row in zip(own_scores, own_rows, strict=True)
                if row >= 0
            ]
            hits.append(fold(found, exact, said))
        longest = max(map(len, hits), default=0)
        kept, where = scores.new_zeros(len(hits), longest), rows.new_full((len(hits), longest), -1)
        for n, own in enumerate(hits):
            kept[n, : len(own)] = torch.tensor([hit.score for hit in own], device="cpu")
            where[n, : len(own)] = torch.tensor([hit.row for hit in own], dtype=torch.int64, device="cpu")
        made.append((kept, where))
        copies.append([{hit.row: replace(hit, example=None) for hit in own} for own in hits])
    return Candidates((made[0], made[1]), (copies[0], copies[1]))


class RankIntervals:
    """The errors of hits and the ranks that they could have; what each layer brings to them, if options."""

    def __init__(
        self, scans: Sequence[CacheScan], found: Candidates, generations: int, options: QueryOptions
    ) -> None:
        """generations: how many queries, the first ones, are no targets: this is about them."""
        shown = max(options.top_k + MARGIN, options.rescored if options.exact else 0)
        self._found, self._layers = found.best(shown), options.layers
        rows = torch.cat([rows[:generations] for _, rows in self._found], 1)
        self._details: Details = details(scans, rows)
        self.layers = self._details.layers if options.layers else ()

    def describe(self, query: int, end: int, hits: Sequence[Hit], *, exact: bool = False) -> list[Hit]:
        """Hits of one end (0: the top), the first of the candidates, with what is known of them. exact: in
        another order and with other scores, which have no error."""
        scores, rows = self._found[end]
        count = int((rows[query] >= 0).sum())
        first = end * self._found[0][1].shape[1]
        errors = self._details.errors[query, first : first + count].tolist()
        parts: Tensor = self._details.parts[query, first : first + count]
        where = {row: n for n, row in enumerate(rows[query, :count].tolist())}
        sign = -1.0 if end else 1.0
        stand = places([sign * score for score in scores[query, :count].tolist()], errors)
        described = []
        for hit in hits:
            n = where.get(hit.row)
            if n is not None and self._layers:
                hit = replace(hit, layers=tuple(parts[n].tolist()))
            if n is not None and not exact and errors[n] == errors[n]:
                place = stand[n]
                hit = replace(hit, error=errors[n], ranks=(place.first, place.last), tied=place.tied)
            described.append(hit)
        return described
