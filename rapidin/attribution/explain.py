"""From the sketches of a query to its results, in named steps: one scan over all caches, then the details of
its hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rapidin.attribution import baselines, methods
from rapidin.attribution.clock import Clock
from rapidin.attribution.common import TrainingSample, sampled_rows
from rapidin.attribution.decoys import DecoyTable, as_whole, compared, decoy_tables
from rapidin.attribution.fused_candidates import fused_candidates, fused_rows
from rapidin.attribution.fusion import FusedRows, read_rows
from rapidin.attribution.groups import group_rows, groups_of, histogram
from rapidin.attribution.hit_gradients import (
    Contributions,
    HitGradients,
    SourceOf,
    order_by_exact,
    target_slices,
)
from rapidin.attribution.interactions import net_of_others, row_sketches
from rapidin.attribution.methods.vectors import known_normalization
from rapidin.attribution.null_scores import counted_rows
from rapidin.attribution.options import QueryOptions
from rapidin.attribution.progress import LOG
from rapidin.attribution.query_sketch import OnStage, Query, scans_of, weights_of
from rapidin.attribution.rerank import Candidates, RankIntervals, find_candidates
from rapidin.attribution.scan import Ends, scores_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.training_data import cached_records, hits_of
from rapidin.attribution.verdict import verdicts
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import Group, Hit, QueryResult, TargetResult

__all__ = ["SourceOf", "explain"]


def explain(
    query: Query,
    options: QueryOptions,
    *,
    records: Sequence[Record],
    data: Examples | None,
    clock: Clock,
    sources: SourceOf,
    decoys: bool = False,
    on_stage: OnStage | None = None,
) -> Results:
    """The hits of each generation, or of all of them together, in the leading process; empty in the others.

    records: the generations as records; data: the training examples, to show with the hits; sources: returns
    the source of one of the query's sketches by its number, for steps that need its model again; decoys:
    whether hits are compared with the decoys of the caches, which all have them.
    """
    work = _Work(query, options, records, data, clock, sources, decoys, on_stage)
    _run(SCANS, work)
    if work.candidates is None:  # another process leads; this one helps with the scans only
        return Results()
    _run(LOOK_UPS, work)
    return Results(work.results)


def _run(steps: Sequence[Callable[[_Work], None]], work: _Work) -> None:
    """The steps, each of which is told by its name when it begins: whoever is told may stop the query."""
    for step in steps:
        if work.on_stage is not None:
            number = (*SCANS, *LOOK_UPS).index(step)
            work.on_stage(step.__name__.replace("_", " "), number, len(SCANS) + len(LOOK_UPS))
        step(work)


@dataclass
class _Work:
    """The state of a query: the arguments of `explain`, and the results of its steps so far.

    scans: the scan of each cache; scored: the scans that give the final scores, of a finer cache if there is
    one; ranked: the generations that get rankings; candidates: more rows at each end than are shown, with a
    fused ranking at the top for `fuse`; highest: gradient score of each of `ranked`, NaN for none; scores:
    of all rows [Q, rows]; tested: the p- and q-values of both ends of each ranking, empty without decoys;
    tables: scores [ranked, rows] of the baselines by name, NaN for rows that are not compared; fused: the
    fused ranking of each of `ranked`; ends: the hits' scores and rows; estimates: the ends before exact
    gradients reordered them; exact: contributions to exact scores; results: of each generation.
    """

    query: Query
    options: QueryOptions
    records: Sequence[Record]
    data: Examples | None
    clock: Clock
    sources: SourceOf
    decoys: bool
    on_stage: OnStage | None
    scans: list[CacheScan] = field(default_factory=list)
    scored: list[CacheScan] = field(default_factory=list)
    ranked: list[Generation] = field(default_factory=list)
    candidates: Candidates | None = None
    scores: Tensor | None = None
    highest: Tensor | None = None
    tables: dict[str, baselines.Floats] = field(default_factory=dict)
    fused: list[FusedRows] = field(default_factory=list)
    tested: list[tuple[DecoyTable, DecoyTable]] = field(default_factory=list)
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
    """Prepares the scan of each cache by the method and the normalization."""
    query, scoring = work.query, work.options.scoring
    work.scans = scans_of(query.sketches, query.texts, scoring)
    finer = [] if query.finer is None else scans_of([query.finer], query.texts, scoring)
    work.scored = finer or work.scans
    work.ranked = _ranked(query.texts, together=scoring.together)
    work.clock.lap("method")


def scan_caches(work: _Work) -> None:
    """Finds the candidates at both ends, rescored by a finer cache and without duplicates if the options say
    so, and the scores of all rows if the histogram, sums by a column or decoys need them; collective."""
    finer = None if work.query.finer is None else work.scored[0]
    work.candidates, work.scores = find_candidates(
        work.scans,
        finer,
        work.options,
        len(work.ranked),
        work.data,
        work.clock,
        scored=work.options.needs_all_scores or work.decoys,
    )
    if work.candidates is not None:
        (scores, rows), _ = work.candidates.best(1)
        work.highest = torch.where(rows >= 0, scores, torch.nan)[: len(work.ranked), 0]


def compare_with_decoys(work: _Work) -> None:
    """Computes p- and q-values from the scores of decoys; collective."""
    if work.decoys:
        assert work.scores is not None
        scans = [_first_queries(scan, len(work.ranked)) for scan in work.scans]
        work.tested = decoy_tables(scans, work.scores)
        work.clock.lap("decoys")


def compare_texts(work: _Work) -> None:
    """Scores the training examples by BM25 and by the model's hidden states."""
    options = work.options
    if not options.reads_texts:
        return
    assert work.data is not None
    assert work.candidates is not None
    source = work.sources(len(work.query.sketches) - 1)
    counted = _counted(work)
    texts = [""] * len(counted)
    rows = [row for row in counted_rows(work.cache).tolist() if row < len(counted) and counted[row]]
    for row, record in zip(rows, cached_records(work.cache, work.data, rows), strict=True):
        texts[row] = baselines.plain_text(record)
    queries = [
        baselines.query_text(record, generation.completion)
        for record, generation in zip(work.records, work.query.texts, strict=True)
    ]
    report: Callable[[int, int], None] | None = None
    if work.on_stage is not None:
        report = partial(work.on_stage, "hidden states")
    length = source.settings.max_length
    assert length is not None
    reads = None
    if options.fuse:
        (_, best), _ = work.candidates.with_duplicates
        reads = partial(read_rows, best[: len(work.ranked)], counted)
    tables = baselines.scores_of_baselines(
        source.loaded, texts, queries, max_length=length, reads=reads, on_progress=report
    )
    if work.options.together:
        shares = weights_of(work.query.texts, range(len(work.query.texts))).numpy()
        tables = {name: shares[None] @ scores for name, scores in tables.items()}
    work.tables = tables
    work.clock.lap("baselines")


def fuse_rankings(work: _Work) -> None:
    """Puts the fused ranking in the place of the most helpful rows."""
    options = work.options
    if not options.fuse:
        return
    assert work.candidates is not None
    work.fused = fused_rows(work.candidates, work.tables, _counted(work), options.fuse_weights)
    work.candidates = fused_candidates(work.scored, work.candidates, work.fused, options, work.data)
    work.clock.lap("fuse")


def estimate_errors(work: _Work) -> None:
    """Estimates standard errors of the candidates' scores, and the contributions of layers to them."""
    options = work.options
    assert work.candidates is not None
    if (options.errors and not options.exact) or options.layers:
        work.intervals = RankIntervals(work.scored, work.candidates, len(work.ranked), options)
        work.clock.lap("errors")


def choose_hits(work: _Work) -> None:
    """Chooses the rows that are shown: the best candidates, or the best by their exact gradients."""
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
        rows = [candidates.rows(n, options.rescored) for n in range(len(work.ranked))]
        work.exact = work.gradients.exact(rows, by_position=options.contributions)
        work.estimates = work.ends
        work.ends = order_by_exact(work.ends, work.exact, options.top_k)
        work.clock.lap("exact")


def look_up_hits(work: _Work) -> None:
    """Makes the results: hits with their examples, copies and errors, and the results of targets."""
    assert work.ends is not None
    options = work.options
    hits_by_query = [
        [hits_of(work.cache, work.data, scores[n], rows[n]) for scores, rows in work.ends]
        for n in range(len(work.ends[0][0]))
    ]
    by_row = _scores_of_hits(work.scored, work.ranked, work.ends)
    slices = target_slices([len(generation.spans) for generation in work.ranked])
    by_generation = [_scores_of_targets(by_row, targets) for targets in slices]
    for n, (generation, targets) in enumerate(zip(work.ranked, slices, strict=True)):
        details = [
            _details_of(work, n, end, [_with_targets(hit, by_generation[n]) for hit in hits])
            for end, hits in enumerate(hits_by_query[n])
        ]
        (top, bottom), decoys = details, None
        if work.tested:
            (top, bottom), decoys = compared(work.tested[n], options.fdr, details)
        work.results.append(
            QueryResult(
                generation.prompt,
                generation.completion,
                generation.generated,
                top,
                bottom,
                known_normalization(work.cache, options.normalize),
                work.clock.seconds,
                options.method,
                len(work.query.texts) if options.together else 0,
                exact=bool(work.exact),
                pieces=generation.pieces,
                targets=_target_results(
                    work, n, generation, targets, hits_by_query[targets], by_generation[n], by_row, top
                ),
                missing=generation.missing,
                examples=len(work.cache),
                layers=() if work.intervals is None else work.intervals.layers,
                fusion=work.fused[n].fusion if work.fused else None,
                decoys=decoys,
            )
        )


def _target_results(
    work: _Work,
    number: int,
    generation: Generation,
    targets: slice,
    hits_by_target: Sequence[Sequence[list[Hit]]],
    of_targets: dict[int, tuple[float, ...]],
    by_row: dict[int, Tensor],
    top: Sequence[Hit],
) -> list[TargetResult]:
    """The results of the targets of a generation, of this number; of_targets, by_row: the scores of hits for
    these targets, and for all queries; top: the hits at the top of its ranking."""
    assert work.candidates is not None
    helpful = [hit for hit in top if hit.score > 0 or hit.fused is not None]
    fdr = work.options.fdr

    def passes(hit: Hit) -> bool:  # as a hit of the whole generation, since parts are not tested
        if fdr is None:
            return True
        score = float(by_row[hit.row][number])
        return any(table.values(score)[1] <= fdr for table in work.tested[number])

    results = []
    for n, (span, ends) in enumerate(zip(generation.spans, hits_by_target, strict=True)):
        ends = [[hit for hit in hits if passes(hit)] for hits in ends]
        influence = sum(hit.targets[n] for hit in helpful) / max(1, len(helpful))
        both = (
            work.candidates.with_copies(
                targets.start + n, end, [_with_targets(hit, of_targets) for hit in hits]
            )
            for end, hits in enumerate(ends)
        )
        results.append(TargetResult(span.text, span.positions, influence, *both))
    return results


def judge(work: _Work) -> None:
    """Adds the verdicts, and what the hits of queries that stand out have in common."""
    query, options = work.query, work.options
    assert work.highest is not None
    found = verdicts(query.sketches if query.finer is None else [query.finer], options, work.highest)
    sample: TrainingSample | None = None
    for n, verdict in enumerate(found):
        examples = [hit.example for hit in work.results[n].helpful if hit.example is not None]
        if verdict is not None and verdict.strength in ("strong", "weak") and work.data is not None:
            sample = sample or _sample(work.cache, work.data)
            verdict = replace(verdict, common=sample.common(examples))
        work.results[n] = as_whole(replace(work.results[n], verdict=verdict))
    work.clock.lap("verdict")


def _sample(cache: Cache, data: Examples) -> TrainingSample:
    """A sample of the training data; an empty one, which is said, if the data is not what was cached."""
    try:
        return TrainingSample(cached_records(cache, data, sampled_rows(cache)))
    except UserError as error:
        LOG.warning("what hits have in common is not compared with the training data: %s", error.what)
        return TrainingSample(())


def summarise_scores(work: _Work) -> None:
    """Adds the histogram of all scores, and their sums by a column."""
    options = work.options
    if not options.needs_all_scores:
        return
    assert work.scores is not None
    by: list[list[Group]] = [[] for _ in work.results]
    if options.by is not None:
        assert work.data is not None
        by = _groups(work, work.data, options.by, work.scores)
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


def _groups(work: _Work, data: Examples, column: str, scores: Tensor) -> list[list[Group]]:
    """The groups of a column for each query, from scores [Q, rows]."""
    group_of_row, names = group_rows(work.cache, data, column, (~scores.isnan()).any(0))
    net = None
    if work.options.interactions:
        scan, count = _first_queries(work.scans[0], len(work.ranked)), len(names)
        sketches = row_sketches(work.cache, count, lambda: work.sources(0), data)
        stage = partial(work.on_stage or _nothing, "groups")
        net = net_of_others(scan, scores, group_of_row, count, sketches, on_group=stage)
    return groups_of(scores, group_of_row, names, net)


def _nothing(stage: str, done: int, total: int) -> None: ...


def compare_baselines(work: _Work) -> None:
    """Adds the ranks of the hits by BM25 and by the model's hidden states."""
    if not work.tables:
        return
    counted = torch.from_numpy(_counted(work))
    work.results = [
        baselines.with_standings(result, {name: scores[n] for name, scores in work.tables.items()}, counted)
        for n, result in enumerate(work.results)
    ]


def attribute_to_tokens(work: _Work) -> None:
    """Adds the contribution of each token of the hits."""
    if work.gradients is None or not work.options.contributions:
        return
    contributions = list(work.exact) or work.gradients.sketched(work.results)
    work.results = work.gradients.with_tokens(work.results, contributions)
    work.clock.lap("tokens")


SCANS: tuple[Callable[[_Work], None], ...] = (
    prepare_scans,
    scan_caches,
    compare_with_decoys,
)
LOOK_UPS: tuple[Callable[[_Work], None], ...] = (
    compare_texts,
    fuse_rankings,
    estimate_errors,
    choose_hits,
    look_up_hits,
    judge,
    summarise_scores,
    compare_baselines,
    attribute_to_tokens,
)


# ----------------------------------------------------------------------------------------------- helpers


def _counted(work: _Work) -> baselines.Bools:
    """The rows that count in all caches: [rows]."""
    masks = [methods.counted(scan.cache) for scan in (*work.scans, *work.scored)]
    rows = min(map(len, masks))
    return torch.stack([mask[:rows] for mask in masks]).all(0).cpu().numpy()


def _first_queries(scan: CacheScan, count: int) -> CacheScan:
    return replace(scan, query=replace(scan.query, vectors=scan.query.vectors[:count]))


def _ranked(texts: Sequence[Generation], *, together: bool) -> list[Generation]:
    """What gets a ranking: each generation, or all of them as one."""
    if not together:
        return list(texts)
    nothing = Encoded([], [], Status.EMPTY)
    return [Generation("", "", any(text.generated for text in texts), nothing)]


def _details_of(work: _Work, query: int, end: int, hits: list[Hit]) -> list[Hit]:
    """Hits of one end (0: the top) with their copies, errors and estimates."""
    assert work.candidates is not None
    hits = work.candidates.with_copies(query, end, hits)
    if work.intervals is not None:
        fused = bool(work.fused) and end == 0
        hits = work.intervals.describe(query, end, hits, exact=bool(work.exact), fused=fused)
    if work.fused and end == 0:
        hits = [replace(hit, fused=work.fused[query].by_row[hit.row]) for hit in hits]
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


def _scores_of_hits(
    scans: Sequence[CacheScan], ranked: Sequence[Generation], ends: Ends
) -> dict[int, Tensor]:
    """The scores [Q] of all queries for each row that is a hit of any; empty if there are no targets."""
    if not any(generation.spans for generation in ranked):
        return {}
    rows = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    rows = rows[rows >= 0]
    scores = sum(scores_of(scan, rows) for scan in scans)
    assert isinstance(scores, Tensor)
    return dict(zip(rows.tolist(), scores.T, strict=True))


def _scores_of_targets(by_row: dict[int, Tensor], targets: slice) -> dict[int, tuple[float, ...]]:
    """The scores of a generation's targets by row. All hits of a row share them: each target has hits, so
    copies would grow with the square of the targets."""
    return {row: tuple(scores[targets].tolist()) for row, scores in by_row.items()}


def _with_targets(hit: Hit, by_row: dict[int, tuple[float, ...]]) -> Hit:
    return replace(hit, targets=by_row[hit.row]) if by_row else hit
