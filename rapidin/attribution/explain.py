"""From the sketches of a query to its results, in named steps: one scan over all caches, then what is looked
up
about its hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rapidin.attribution import baselines, methods
from rapidin.attribution.clock import Clock
from rapidin.attribution.groups import groups, histogram
from rapidin.attribution.hit_gradients import (
    Contributions,
    HitGradients,
    OnStage,
    SourceOf,
    target_slices,
)
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.query_sketch import Query, scans_of, weights_of
from rapidin.attribution.rerank import Candidates, RankIntervals, find_candidates
from rapidin.attribution.scan import Ends, all_scores, scores_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.training_data import hits_of
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import Group, Hit, QueryResult, TargetResult

__all__ = ["OnStage", "SourceOf", "explain"]


def explain(
    query: Query,
    options: QueryOptions,
    *,
    records: Sequence[Record],
    data: Examples | None,
    clock: Clock,
    sources: SourceOf,
    on_stage: OnStage | None = None,
) -> Results:
    """The hits of each generation, or of all of them together; of several processes, for the leader alone.

    records: the generations as records; data: the training examples, to show with the hits; sources: gives
    the source of each of the query's sketches by its number, for what needs its model again.
    """
    work = _Work(query, options, records, data, clock, sources, on_stage)
    for step in SCANS:
        step(work)
    if work.candidates is None:  # another process leads, which needed this one for the scans
        return Results()
    for step in LOOK_UPS:
        step(work)
    return Results(work.results)


@dataclass
class _Work:
    """A query on its way to results: what `explain` is given, and what its steps have found so far.

    scans: what each cache is scanned for; scored: those whose scores are final, of a finer cache if there is
    one; asked: the generations that have hits of their own; candidates: more rows at each end than are shown;
    scores: of all rows [Q, rows]; ends: the hits' scores and rows; estimates: the ends before exact gradients
    reordered them; exact: contributions to exact scores; results: of each generation.
    """

    query: Query
    options: QueryOptions
    records: Sequence[Record]
    data: Examples | None
    clock: Clock
    sources: SourceOf
    on_stage: OnStage | None
    scans: list[CacheScan] = field(default_factory=list)
    scored: list[CacheScan] = field(default_factory=list)
    asked: list[Generation] = field(default_factory=list)
    candidates: Candidates | None = None
    scores: Tensor | None = None
    intervals: RankIntervals | None = None
    ends: Ends | None = None
    estimates: Ends | None = None
    exact: list[Contributions] = field(default_factory=list)
    gradients: HitGradients | None = None
    results: list[QueryResult] = field(default_factory=list)

    @property
    def cache(self) -> Cache:
        """The cache whose rows hits are counted by."""
        return self.query.sketches[0].cache


# ------------------------------------------------------------------------------------------------- steps


def prepare_scans(work: _Work) -> None:
    """What each cache is scanned for, by the method and the normalisation."""
    query, scoring = work.query, work.options.scoring
    work.scans = scans_of(query.sketches, query.texts, scoring)
    finer = [] if query.finer is None else scans_of([query.finer], query.texts, scoring)
    work.scored = finer or work.scans
    work.asked = _asked(query.texts, together=scoring.together)
    work.clock.lap("method")


def scan_caches(work: _Work) -> None:
    """The candidates at both ends, rescored by a finer cache and folded if asked for; collective."""
    finer = None if work.query.finer is None else work.scored[0]
    work.candidates = find_candidates(work.scans, finer, work.options, len(work.asked), work.data, work.clock)


def score_all_examples(work: _Work) -> None:
    """The scores of all rows, if the histogram or sums by a column are asked for; collective."""
    if work.options.needs_all_scores:
        work.scores = all_scores([_first_queries(scan, len(work.asked)) for scan in work.scans])
        work.clock.lap("all scores")


def estimate_errors(work: _Work) -> None:
    """Standard errors of the candidates' scores, and what each layer contributes to them."""
    options = work.options
    assert work.candidates is not None
    if (options.errors and not options.exact) or options.layers:
        work.intervals = RankIntervals(work.scored, work.candidates, len(work.asked), options)
        work.clock.lap("errors")


def choose_hits(work: _Work) -> None:
    """The rows that are shown: the best candidates, or the best by their exact gradients."""
    options, candidates = work.options, work.candidates
    assert candidates is not None
    work.ends = candidates.best(options.rescored if options.exact else options.top_k)
    if not options.needs_gradients:
        return
    assert work.data is not None
    work.gradients = HitGradients(
        work.query, work.scored, options.scoring, work.data, work.sources, work.on_stage
    )
    if options.exact:
        rows = [candidates.rows(n, options.rescored) for n in range(len(work.asked))]
        work.exact = work.gradients.exact(rows)
        work.estimates = work.ends
        work.ends = _by_exact(work.ends, work.exact, options.top_k)
        work.clock.lap("exact")


def look_up_hits(work: _Work) -> None:
    """The results: hits with their examples, copies, errors, and the shares of the query's targets."""
    assert work.ends is not None
    assert work.candidates is not None
    options = work.options
    found = [
        [hits_of(work.cache, work.data, scores[n], rows[n]) for scores, rows in work.ends]
        for n in range(len(work.ends[0][0]))
    ]
    by_row = _scores_of_hits(work.scored, work.asked, work.ends)
    slices = target_slices([len(generation.spans) for generation in work.asked])
    for n, (generation, own) in enumerate(zip(work.asked, slices, strict=True)):
        top, bottom = (
            _known_of(work, n, end, [_with_targets(hit, by_row, own) for hit in hits])
            for end, hits in enumerate(found[n])
        )
        targets = []
        for place, (span, hits) in enumerate(zip(generation.spans, found[own], strict=True)):
            influence = sum(hit.targets[place] for hit in top) / max(1, len(top))
            both = (
                work.candidates.with_copies(
                    own.start + place, end, [_with_targets(hit, by_row, own) for hit in side]
                )
                for end, side in enumerate(hits)
            )
            targets.append(TargetResult(span.text, span.positions, influence, *both))
        work.results.append(
            QueryResult(
                generation.prompt,
                generation.completion,
                generation.generated,
                top,
                bottom,
                options.normalize,
                work.clock.seconds,
                options.method,
                len(work.query.texts) if options.together else 0,
                exact=bool(work.exact),
                pieces=generation.pieces,
                targets=targets,
                missing=generation.missing,
                examples=len(work.cache),
                layers=() if work.intervals is None else work.intervals.layers,
            )
        )


def summarise_scores(work: _Work) -> None:
    """The histogram of all scores, and their sums by a column."""
    if work.scores is None:
        return
    options = work.options
    by: list[list[Group]] = [[] for _ in work.results]
    if options.by is not None:
        assert work.data is not None
        by = groups(work.cache, work.data, options.by, work.scores)
    work.results = [
        replace(
            result,
            histogram=histogram(scores) if options.histogram else None,
            by=options.by,
            groups=of_column,
            examples=int((~scores.isnan()).sum()),
        )
        for result, scores, of_column in zip(work.results, work.scores, by, strict=True)
    ]
    work.clock.lap("all scores")


def compare_baselines(work: _Work) -> None:
    """Where BM25 and the model's hidden states rank the hits."""
    if not work.options.baselines:
        return
    assert work.data is not None
    source = work.sources(len(work.query.sketches) - 1)
    if source.loaded.sharded:
        raise UserError("--baselines needs an unsharded model", "leave out --shard-model")
    counted = methods.counted(work.cache)
    texts = [
        baselines.plain_text(work.data[row]) if counts else "" for row, counts in enumerate(counted.tolist())
    ]
    asked = [
        baselines.query_text(record, generation.completion)
        for record, generation in zip(work.records, work.query.texts, strict=True)
    ]
    report: Callable[[int, int], None] | None = None
    if work.on_stage is not None:
        report = partial(work.on_stage, "hidden states")
    tables = baselines.scores_of_baselines(
        source.loaded, texts, asked, max_length=source.encoder.max_length, on_progress=report
    )
    if work.options.together:
        shares = weights_of(work.query.texts, range(len(work.query.texts))).numpy()
        tables = {name: shares[None] @ scores for name, scores in tables.items()}
    work.results = [
        baselines.with_standings(result, {name: scores[n] for name, scores in tables.items()}, counted)
        for n, result in enumerate(work.results)
    ]
    work.clock.lap("baselines")


def attribute_to_tokens(work: _Work) -> None:
    """What each token of a hit contributes to its score."""
    if work.gradients is None or not work.options.contributions:
        return
    known = list(work.exact) or work.gradients.sketched(work.results)
    work.results = work.gradients.with_tokens(work.results, known)
    work.clock.lap("tokens")


SCANS: tuple[Callable[[_Work], None], ...] = (prepare_scans, scan_caches, score_all_examples)
LOOK_UPS: tuple[Callable[[_Work], None], ...] = (
    estimate_errors,
    choose_hits,
    look_up_hits,
    summarise_scores,
    compare_baselines,
    attribute_to_tokens,
)


# ----------------------------------------------------------------------------------------------- helpers


def _first_queries(scan: CacheScan, count: int) -> CacheScan:
    return replace(scan, query=replace(scan.query, vectors=scan.query.vectors[:count]))


def _asked(texts: Sequence[Generation], *, together: bool) -> list[Generation]:
    """What has hits of its own: the generations, or all of them as one."""
    if not together:
        return list(texts)
    nothing = Encoded([], [], Status.EMPTY)
    return [Generation("", "", any(text.generated for text in texts), nothing)]


def _known_of(work: _Work, query: int, end: int, hits: list[Hit]) -> list[Hit]:
    """Hits of one end (0: the top) with their copies, errors and estimates."""
    assert work.candidates is not None
    hits = work.candidates.with_copies(query, end, hits)
    if work.intervals is not None:
        hits = work.intervals.describe(query, end, hits, exact=bool(work.exact))
    if not work.exact:
        return hits
    assert work.estimates is not None
    estimates, exact = _scores_by_row(work.estimates, query), work.exact[query]
    return [
        replace(hit, estimate=estimates[hit.row], targets=tuple(exact[hit.row][1:].sum(1).tolist()))
        for hit in hits
    ]


def _scores_by_row(ends: Ends, query: int) -> dict[int, float]:
    """The scores of a query's rows at both ends."""
    return {
        row: score
        for scores, rows in ends
        for row, score in zip(rows[query].tolist(), scores[query].tolist(), strict=True)
    }


def _by_exact(ends: Ends, exact: Sequence[Contributions], top_k: int) -> Ends:
    """The ends in the order of exact scores, as far as those are known: of the first queries."""
    reordered = []
    for (scores, rows), sign in zip(ends, (-1, 1), strict=True):
        scores, rows = scores[:, :top_k].clone(), rows[:, :top_k].clone()
        for n, parts in enumerate(exact):
            order = sorted((sign * float(parts[row][0].sum()), row) for row in parts)[:top_k]
            rows[n] = -1
            rows[n, : len(order)] = torch.tensor([row for _, row in order], device="cpu")
            scores[n, : len(order)] = torch.tensor([sign * score for score, _ in order], device="cpu")
        reordered.append((scores, rows))
    return reordered[0], reordered[1]


def _scores_of_hits(scans: Sequence[CacheScan], asked: Sequence[Generation], ends: Ends) -> dict[int, Tensor]:
    """The scores [Q] of all queries for each row that is a hit of any; empty if there are no targets."""
    if not any(generation.spans for generation in asked):
        return {}
    rows = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    rows = rows[rows >= 0]
    scores = sum(scores_of(scan, rows) for scan in scans)
    assert isinstance(scores, Tensor)
    return dict(zip(rows.tolist(), scores.T, strict=True))


def _with_targets(hit: Hit, by_row: dict[int, Tensor], own: slice) -> Hit:
    return replace(hit, targets=tuple(by_row[hit.row][own].tolist())) if by_row else hit
