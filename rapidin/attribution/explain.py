"""From sketches of generations to hits: one scan over all caches, and what is looked up about its hits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rapidin.attribution import baselines, methods, token_contributions
from rapidin.attribution.attributor import Attributor
from rapidin.attribution.clock import Clock
from rapidin.attribution.groups import groups, histogram
from rapidin.attribution.options import Scoring, Wanted
from rapidin.attribution.query_sketch import Query, sources, weights_of
from rapidin.attribution.rerank import Sureness, find
from rapidin.attribution.scan import Ends, Source, all_scores, hits_of, scores_of
from rapidin.cache import Cache
from rapidin.data.encoding import Encoded, Status
from rapidin.data.examples import Examples
from rapidin.data.generations import Generation
from rapidin.data.records import Record
from rapidin.errors import UserError
from rapidin.results.collection import Results
from rapidin.results.types import Group, Hit, QueryResult, TargetResult, Tokens

OnStage = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def explain(
    query: Query,
    scoring: Scoring,
    wanted: Wanted,
    *,
    records: Sequence[Record],
    data: Examples | None,
    clock: Clock,
    models: Callable[[int], Attributor],
    on_stage: OnStage | None = None,
) -> Results:
    """The hits of each generation, or of all of them together; of several processes, for the leader alone.

    records: the generations as records; data: the training examples, to show with the hits; models:
    gives the attributor of each of the query's parts by its number, for what needs its model again.
    """
    texts = query.texts
    scanned = sources(query.parts, texts, scoring)
    again = [] if query.finer is None else sources([query.finer], texts, scoring)
    clock.lap("method")
    cache, asked = query.parts[0].cache, _asked(texts, scoring)
    candidates = find(scanned, again[0] if again else None, wanted, len(asked), data, clock)
    everything = None
    if wanted.overview:
        everything = all_scores([_first(source, len(asked)) for source in scanned])
        clock.lap("all scores")
    if candidates is None:  # another process leads
        return Results()
    sure = None
    if (wanted.errors and not wanted.exact) or wanted.layers:
        sure = Sureness(again or scanned, candidates, len(asked), wanted)
        clock.lap("errors")
    ends = candidates.best(wanted.candidates if wanted.exact else wanted.top_k)
    look = _Inside(query, again or scanned, scoring, data, models, on_stage) if wanted.inside else None
    exact: list[dict[int, Tensor]] = []
    if look is not None and wanted.exact:
        exact = look.exact([candidates.rows(n, wanted.candidates) for n in range(len(asked))])
        estimates = ends
        ends = _by_exact(ends, exact, wanted.top_k)
        clock.lap("exact")
    found = [[hits_of(cache, data, s[n], r[n]) for s, r in ends] for n in range(len(ends[0][0]))]
    parts = _all_parts(again or scanned, asked, ends)
    results = []
    for n, (text, own) in enumerate(zip(asked, _of_targets([len(t.spans) for t in asked]), strict=True)):
        top, bottom = (
            candidates.with_copies(n, end, [_with_targets(hit, parts, own) for hit in hits])
            for end, hits in enumerate(found[n])
        )
        if sure is not None:
            top, bottom = (
                sure.told(n, end, hits, exact=bool(exact)) for end, hits in enumerate((top, bottom))
            )
        if exact:
            before = _estimates(estimates, n)
            top, bottom = (
                [replace(hit, estimate=before[hit.row], targets=_sums(exact[n][hit.row][1:])) for hit in hits]
                for hits in (top, bottom)
            )
        targets = []
        for place, (span, hits) in enumerate(zip(text.spans, found[own], strict=True)):
            influence = sum(hit.targets[place] for hit in top) / max(1, len(top))
            both = (
                candidates.with_copies(
                    own.start + place, end, [_with_targets(hit, parts, own) for hit in side]
                )
                for end, side in enumerate(hits)
            )
            targets.append(TargetResult(span.text, span.positions, influence, *both))
        results.append(
            QueryResult(
                text.prompt,
                text.completion,
                text.generated,
                top,
                bottom,
                scoring.normalize,
                clock.seconds,
                scoring.method,
                len(texts) if scoring.together else 0,
                exact=bool(exact),
                pieces=text.pieces,
                targets=targets,
                missing=text.missing,
                examples=len(cache),
                layers=() if sure is None else sure.layers,
            )
        )
    if everything is not None:
        results = _with_overview(results, cache, data, wanted, everything)
        clock.lap("all scores")
    if wanted.baselines:
        results = _with_baselines(results, query, scoring, data, records, models, on_stage)
        clock.lap("baselines")
    if look is not None and wanted.contributions:
        results = look.with_tokens(results, exact)
        clock.lap("tokens")
    return Results(results)


def _first(source: Source, queries: int) -> Source:
    """A source with the first queries alone."""
    return replace(source, query=replace(source.query, vectors=source.query.vectors[:queries]))


def _with_overview(
    results: Sequence[QueryResult], cache: Cache, data: Examples | None, wanted: Wanted, scores: Tensor
) -> list[QueryResult]:
    """The results with the histogram of all scores [Q, rows], and their sums by a column."""
    by: list[list[Group]] = [[] for _ in results]
    if wanted.by is not None:
        assert data is not None
        by = groups(cache, data, wanted.by, scores)
    return [
        replace(
            result,
            histogram=histogram(own) if wanted.histogram else None,
            by=wanted.by,
            groups=found,
            examples=int((~own.isnan()).sum()),
        )
        for result, own, found in zip(results, scores, by, strict=True)
    ]


def _with_baselines(
    results: Sequence[QueryResult],
    query: Query,
    scoring: Scoring,
    data: Examples | None,
    records: Sequence[Record],
    models: Callable[[int], Attributor],
    on_stage: OnStage | None,
) -> list[QueryResult]:
    """The results, their hits with where the baselines rank them."""
    assert data is not None
    attributor = models(len(query.parts) - 1)
    if attributor.loaded.sharded:
        raise UserError("--baselines need the model whole in one process", "leave out --shard-model")
    cache = query.parts[0].cache
    counted = methods.counted(cache)
    rows = [baselines.plain_text(data[row]) if counts else "" for row, counts in enumerate(counted.tolist())]
    asked = [
        baselines.asked_text(record, text.completion)
        for record, text in zip(records, query.texts, strict=True)
    ]
    tell = None if on_stage is None else partial(on_stage, "hidden states")
    made = baselines.both(attributor.loaded, rows, asked, max_length=attributor.max_length, on_progress=tell)
    if scoring.together:
        shares = weights_of(query.texts, range(len(query.texts))).numpy()
        made = {name: shares[None] @ scores for name, scores in made.items()}
    return [
        baselines.beside(result, {name: scores[n] for name, scores in made.items()}, counted)
        for n, result in enumerate(results)
    ]


def _asked(texts: Sequence[Generation], scoring: Scoring) -> list[Generation]:
    """What has hits of its own: the generations, or all of them as one."""
    if not scoring.together:
        return list(texts)
    nothing = Encoded([], [], Status.EMPTY)
    return [Generation("", "", any(text.generated for text in texts), nothing)]


def _estimates(ends: Ends, n: int) -> dict[int, float]:
    """The scores of a query's rows at both ends."""
    return {
        row: score
        for scores, rows in ends
        for row, score in zip(rows[n].tolist(), scores[n].tolist(), strict=True)
    }


def _by_exact(ends: Ends, exact: Sequence[dict[int, Tensor]], top_k: int) -> Ends:
    """The ends in the order of exact scores, as far as those are known: of the first queries."""
    made = []
    for (scores, rows), sign in zip(ends, (-1, 1), strict=True):
        scores, rows = scores[:, :top_k].clone(), rows[:, :top_k].clone()
        for n, parts in enumerate(exact):
            order = sorted((sign * float(parts[row][0].sum()), row) for row in parts)[:top_k]
            rows[n] = -1
            rows[n, : len(order)] = torch.tensor([row for _, row in order], device="cpu")
            scores[n, : len(order)] = torch.tensor([sign * score for score, _ in order], device="cpu")
        made.append((scores, rows))
    return made[0], made[1]


def _of_targets(spans: Sequence[int]) -> list[slice]:
    """Of generations with so many targets each, where theirs are among all queries."""
    edges = list(accumulate(spans, initial=len(spans)))
    return [slice(*pair) for pair in pairwise(edges)]


def _all_parts(scanned: Sequence[Source], asked: Sequence[Generation], ends: Ends) -> dict[int, Tensor]:
    """The scores [Q] of all queries for each row that is a hit of anything; nothing where there are no
    targets."""
    if not any(text.spans for text in asked):
        return {}
    rows = torch.unique(torch.cat([rows.flatten() for _, rows in ends]))
    rows = rows[rows >= 0]
    scores = sum(scores_of(source, rows) for source in scanned)
    assert isinstance(scores, Tensor)
    return dict(zip(rows.tolist(), scores.T, strict=True))


def _with_targets(hit: Hit, parts: dict[int, Tensor], own: slice) -> Hit:
    return replace(hit, targets=tuple(parts[hit.row][own].tolist())) if parts else hit


def _sums(parts: Tensor) -> tuple[float, ...]:
    return tuple(parts.sum(1).tolist())


class _Inside:
    """What needs the gradients of hits again: `rapidin.attribution.token_contributions` for all models and
    hits of a query."""

    def __init__(
        self,
        query: Query,
        scanned: Sequence[Source],
        scoring: Scoring,
        data: Examples | None,
        models: Callable[[int], Attributor],
        on_stage: OnStage | None,
    ) -> None:
        assert data is not None
        self._query, self._scanned, self._scoring = query, scanned, scoring
        self._data, self._models, self._on_stage = data, models, on_stage
        self._read: dict[int, tuple[Encoded, list[str]]] = {}  # hits by row, and what their tokens say

    def exact(self, rows: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
        """By row, for each that has hits: what each position of the example brings to its exact score, and to
        the parts of it that targets have: [1 + targets, T] float64."""
        texts = self._query.texts
        found: list[dict[int, Tensor]] = [{} for _ in rows]
        for number, attributor in self._each_model():
            weight = self._query.parts[number].weight
            queries, weights, owners = attributor.target_queries(texts)
            total = sum(map(len, rows)) * len(attributor.points)
            done = 0
            for n, chosen in enumerate(rows):
                members = range(len(texts)) if self._scoring.together else [n]
                mine = [t for t, owner in enumerate(owners) if owner in members]
                made = token_contributions.exact(
                    attributor,
                    [texts[m].encoded for m in members] + [queries[t] for t in mine],
                    [weight * w for w in self._shares(members)] + [weight * weights[t] for t in mine],
                    [*range(len(members)), *(members.index(owners[t]) for t in mine)],
                    [self._encoded(attributor, row) for row in chosen],
                    self._scoring.normalize,
                    self._tell("exact gradients", done, total),
                )
                done += len(chosen) * len(attributor.points)
                for row, parts in zip(chosen, made, strict=True):
                    whole = parts[: len(members)].sum(0, keepdim=True)
                    parts = torch.cat([whole, parts[len(members) :]])
                    found[n][row] = found[n][row] + parts if row in found[n] else parts
        return found

    def with_tokens(
        self, results: Sequence[QueryResult], exact: Sequence[dict[int, Tensor]]
    ) -> list[QueryResult]:
        """The results, their hits with what each of their tokens contributes."""
        known = list(exact) or self._sketched(results)
        made = []
        for result, parts in zip(results, known, strict=True):
            top, bottom = (
                [replace(hit, tokens=self._tokens(hit.row, parts[hit.row])) for hit in hits]
                for hits in (result.top, result.bottom)
            )
            made.append(replace(result, top=top, bottom=bottom))
        return made

    def _tokens(self, row: int, parts: Tensor) -> Tokens:
        text, pieces = self._read[row]
        by_target = parts[1:].float().numpy() if len(parts) > 1 else None
        return Tokens(tuple(pieces), tuple(text.target), tuple(parts[0].tolist()), by_target)

    def _sketched(self, results: Sequence[QueryResult]) -> list[dict[int, Tensor]]:
        """As `exact`, of the products of sketches."""
        hits = [sorted({hit.row for hit in (*result.top, *result.bottom)}) for result in results]
        rows = sorted({row for chosen in hits for row in chosen})
        found: list[dict[int, Tensor]] = [{} for _ in results]
        own = _of_targets([len(result.targets) for result in results])
        for number, attributor in self._each_model():
            source = self._scanned[number]
            tell = self._tell("tokens of hits", 0, len(rows))
            for done, row in enumerate(rows):
                factors = None if source.query.factors is None else source.query.factors[row]
                made = token_contributions.sketched(
                    attributor, self._encoded(attributor, row), source.query, factors
                )
                for n, chosen in enumerate(hits):
                    if row in chosen:
                        parts = torch.cat([made[n : n + 1], made[own[n]]]).double()
                        found[n][row] = found[n][row] + parts if row in found[n] else parts
                tell(done + 1)
        return found

    def _each_model(self) -> Iterable[tuple[int, Attributor]]:
        for number in range(len(self._query.parts)):
            attributor = self._models(number)
            if attributor.loaded.sharded:
                raise UserError(
                    "what lies inside of hits needs the model whole in one process",
                    "leave out --shard-model, or what asks for it",
                )
            yield number, attributor

    def _shares(self, members: Sequence[int]) -> list[float]:
        """Of each generation in the target set of all of them."""
        if not self._scoring.together:
            return [1.0]
        return weights_of(self._query.texts, members).tolist()

    def _encoded(self, attributor: Attributor, row: int) -> Encoded:
        text = attributor.encoder.example(self._data.get(row))
        if row not in self._read:
            self._read[row] = text, attributor.encoder.pieces(text.ids)
        elif self._read[row][0].ids != text.ids:
            raise UserError("the models of these caches read a text as other tokens", "ask one of them alone")
        return text

    def _tell(self, stage: str, before: int, total: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            if self._on_stage is not None:
                self._on_stage(stage, before + done, total)

        return tell
