"""p- and q-values of hits: whether they score higher than texts that were never trained on.

Such texts, decoys, are cached beside the examples (`rapidin cache --decoys`). With N decoys the p-value of a
row is

    p = (1 + decoys that score at least as high) / (1 + N),

and for harmful hits the same with "low" for "high". It is a conformal p-value (Bates, Candes, Lei, Romano and
Sesia, Annals of Statistics 2023, eq. 3): if a row is exchangeable with the decoys, it is at most u with a
chance of at most u. Its q-value is the least false-discovery rate at which the row passes by the procedure of
Benjamini and Hochberg (1995), over all rows of the cache, each text once: copies would otherwise help each
other to pass. Bates et al. (section 2.3) prove that the procedure holds its rate for such p-values, which
depend on each other because the decoys are shared. A row whose score has the other sign has p = 1.

p and q depend on the score through the number of decoys beyond it alone, so N + 1 numbers for each end of a
query have the q-values of any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rapidin.attribution.options import QueryOptions
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache
from rapidin.errors import UserError
from rapidin.results.decoys import DecoyTest
from rapidin.results.types import Hit, QueryResult
from rapidin.results.verdict import Verdict

SIGNS = (1, -1)  # of the ends of a ranking: helpful, harmful


def distinct_rows(cache: Cache) -> Tensor:
    """Which rows count and are the first with their record: [rows] bool, on the CPU."""
    chosen = torch.zeros(cache.table_rows(1), dtype=torch.bool, device="cpu")
    numbers: list[Tensor] = []
    hashes: list[Tensor] = []
    for first, shard in cache.shards():
        counts = shard.status == 0
        numbers.append(first + counts.nonzero()[:, 0])
        hashes.append(shard.record[counts])
    if numbers:
        _, at = np.unique(torch.cat(hashes).numpy(), return_index=True)
        chosen[torch.cat(numbers)[torch.from_numpy(at)]] = True
    return chosen


def counted_decoys(cache: Cache, decoys: Cache) -> Tensor:
    """Which decoys of a cache count: [decoys] bool. Left out are those without a sketch, copies of others,
    and those that are examples of the cache, word for word."""
    counted = distinct_rows(decoys)
    hashes = decoys.records()
    for _, shard in cache.shards():
        counted &= ~torch.isin(hashes, shard.record)
    return counted


def decoys_text(cache: Cache, decoys: Cache) -> str:
    """How many decoys a cache has, and how many of them do not count."""
    count = int(counted_decoys(cache, decoys).sum())
    text = f"{count:,} decoy{'' if count == 1 else 's'}"
    others = len(decoys) - count
    if others:
        text += f" and {others:,} more that do not count: they have no sketch, or are copies of others or of "
        text += "examples"
    return text


def has_decoys(caches: Sequence[Cache], options: QueryOptions) -> bool:
    """Whether the hits of a query get p- and q-values. Raises UserError if they do not and `fdr` is asked
    for, and if decoys are damaged."""
    reason, remedy = _why_not(caches, options)
    if reason and options.fdr is not None:
        raise UserError(f"`fdr` is not possible: {reason}", remedy)
    return not reason


def _why_not(caches: Sequence[Cache], options: QueryOptions) -> tuple[str, str]:
    """Why hits get no p- and q-values, and what to do about it; ("", "") if they do."""
    for cache in caches:
        if cache.decoys is None:
            return (
                f"the cache {cache.path} has no decoys",
                "run its 'rapidin cache' command again with `decoys` and texts that were never trained on",
            )
        if not cache.decoys.manifest.complete:
            return (
                f"the decoys of the cache {cache.path} are unfinished",
                "run the same 'rapidin cache' again",
            )
    identities = {cache.decoys.manifest.data["identity"] for cache in caches if cache.decoys is not None}
    if len(identities) > 1:
        return "the caches have different decoys", "give all caches the same"
    if options.method != "dot":
        # The examples are in the Hessian or the Fisher matrix that their scores are divided by.
        return f"'{options.method}' does not treat decoys as it treats examples", "use `method='dot'`"
    if options.rescore is not None:
        return "`rescore` gives new scores to some examples only", "leave out one of them"
    return "", ""


@dataclass(frozen=True)
class DecoyTable:
    """The p- and q-values at one end of a query's ranking.

    sign: 1 for helpful rows, -1 for harmful ones; decoys: [N], their scores times the sign, ascending; q:
    [N + 1] float64, by the number of decoys beyond a score; rows: [N + 1], the distinct rows with at most so
    many decoys beyond their score.
    """

    sign: int
    decoys: Tensor
    q: Tensor
    rows: Tensor

    @staticmethod
    def of(scores: Tensor, decoys: Tensor, sign: int) -> DecoyTable:
        """The table for the scores [n] of all distinct rows that count, and of decoys [N]; NaN is left
        out."""
        ordered = (sign * decoys[~decoys.isnan()]).sort().values
        levels = _levels(sign * scores[~scores.isnan()], ordered)
        rows = torch.bincount(levels, minlength=len(ordered) + 1).cumsum(0)
        p = torch.arange(1, len(ordered) + 2, dtype=torch.float64, device="cpu") / (len(ordered) + 1)
        rates = len(levels) * p / rows.clamp(min=1)
        q = rates.flip(0).cummin(0).values.flip(0).clamp(max=1)
        return DecoyTable(sign, ordered, q, rows)

    def values(self, score: float) -> tuple[float, float]:
        """p and q of a row by its score."""
        scores = torch.tensor([self.sign * score], dtype=self.decoys.dtype, device="cpu")
        level = int(_levels(scores, self.decoys)[0])
        return (level + 1) / (len(self.decoys) + 1), float(self.q[level])

    def passing(self, fdr: float) -> int:
        """How many distinct rows pass a false-discovery rate."""
        passes = (self.q <= fdr).nonzero()
        return int(self.rows[passes[-1, 0]]) if len(passes) else 0


def _levels(scores: Tensor, decoys: Tensor) -> Tensor:
    """The number of decoys at or above each score; all of them for scores that are not positive."""
    below = torch.searchsorted(decoys, scores)
    return torch.where(scores > 0, len(decoys) - below, len(decoys))


def decoy_tables(scans: Sequence[CacheScan], scores: Tensor) -> list[tuple[DecoyTable, DecoyTable]]:
    """The tables of both ends of each query; collective.

    scans: of caches with decoys, for the same queries as scores [Q, rows], those of all rows.
    """
    cache = scans[0].cache
    assert cache.decoys is not None
    of_decoys = all_scores(
        [replace(scan, cache=scan.cache.decoys) for scan in scans if scan.cache.decoys is not None]
    )
    counted, distinct = counted_decoys(cache, cache.decoys), distinct_rows(cache)
    return [
        (
            DecoyTable.of(of_rows[distinct], decoys[counted], SIGNS[0]),
            DecoyTable.of(of_rows[distinct], decoys[counted], SIGNS[1]),
        )
        for of_rows, decoys in zip(scores, of_decoys, strict=True)
    ]


def compared(
    tables: tuple[DecoyTable, DecoyTable], fdr: float | None, ends: Sequence[list[Hit]]
) -> tuple[Sequence[list[Hit]], DecoyTest]:
    """The hits of a query's ends with their p- and q-values, without those that do not pass a false-discovery
    rate, and what the decoys say."""
    tested = [[_tested(hit, table) for hit in hits] for table, hits in zip(tables, ends, strict=True)]
    helpful, harmful = tables
    counts = len(helpful.decoys), int(helpful.rows[-1]), (int(helpful.rows[0]), int(harmful.rows[0]))
    if fdr is None:
        return tested, DecoyTest(*counts)
    passing = [[hit for hit in hits if hit.q is not None and hit.q <= fdr] for hits in tested]
    passed = helpful.passing(fdr), harmful.passing(fdr)
    return passing, DecoyTest(*counts, fdr, passed, _signed(tables, tested), _signed(tables, passing))


def stands_out(verdict: Verdict | None, fdr: float) -> bool:
    """Whether the chance that a neutral question comes as far up as the query, by its verdict, is at most
    `fdr` / 2; True if there are not enough such questions to tell.

    Decoys are not quite exchangeable with rows that were trained on, less so the better these were learnt.
    But neutral questions have their scores with these same rows.
    """
    place = None if verdict is None else verdict.questions
    if place is None or 1 / (len(place.scores) + 1) > fdr / 2:
        return True
    return place.chance <= fdr / 2


def as_whole(result: QueryResult) -> QueryResult:
    """The same without hits if a false-discovery rate is asked for and the query as a whole does not stand
    out."""
    test, verdict = result.decoys, result.verdict
    if test is None or test.fdr is None or stands_out(verdict, test.fdr):
        return result
    assert verdict is not None
    assert verdict.questions is not None
    count = len(verdict.questions.scores)
    test = replace(test, passed=(0, 0), hits=(0, 0), neutral=(count - verdict.questions.above, count))
    targets = [replace(target, top=[], bottom=[]) for target in result.targets]
    return replace(result, top=[], bottom=[], targets=targets, decoys=test)


def _tested(hit: Hit, table: DecoyTable) -> Hit:
    p, q = table.values(hit.score)
    return replace(hit, p=p, q=q)


def _signed(tables: tuple[DecoyTable, DecoyTable], ends: Sequence[list[Hit]]) -> tuple[int, int]:
    """How many hits of each end have its sign."""
    top, bottom = (
        sum(table.sign * hit.score > 0 for hit in hits) for table, hits in zip(tables, ends, strict=True)
    )
    return top, bottom
