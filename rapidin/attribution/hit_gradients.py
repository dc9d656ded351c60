"""The gradients of hits, computed again: exact scores, and what each token of a hit contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rapidin.attribution import token_contributions
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import OnStage, Query, target_texts, weights_of
from rapidin.attribution.scan import Ends
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.data.encoding import AnyExample
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.gradients.source import GradientSource
from rapidin.results.types import QueryResult, Tokens

SourceOf = Callable[[int], GradientSource]  # the source of a query's sketch, by the sketch's number

# By row of a hit: what each position of the example contributes to its score, then to the score of each
# target: [1 + targets, T] float64, or [1 + targets, 1] if positions are not told apart.
Contributions = dict[int, Tensor]


class HitGradients:
    """Recomputes gradients of hits, by all models of a query.

    scans: what each cache was scanned for; data: the training examples; sources: gives the source of each of
    the query's sketches, one model after another.
    """

    def __init__(
        self,
        query: Query,
        scans: Sequence[CacheScan],
        scoring: ScoringConfig,
        data: Examples,
        sources: SourceOf,
        on_stage: OnStage | None,
    ) -> None:
        self._query, self._scans, self._scoring = query, scans, scoring
        self._data, self._sources, self._on_stage = data, sources, on_stage
        # Of each hit, by row: the ids of its tokens, which of them count, and their texts.
        self._texts: dict[int, tuple[list[int], list[bool], list[str]]] = {}

    def exact(self, rows: Sequence[Sequence[int]], *, by_position: bool) -> list[Contributions]:
        """The exact scores of the given rows, or what positions contribute to them; rows: for each
        generation, or for all together."""
        generations = self._query.texts
        contributions: list[Contributions] = [{} for _ in rows]
        for number, source in self._each_source():
            weight = self._query.sketches[number].weight
            targets = target_texts(generations, source.settings.loss)
            total = sum(map(len, rows)) * len(source.points)
            done = 0
            for n, hits in enumerate(rows):
                members = range(len(generations)) if self._scoring.together else [n]
                chosen = [t for t, owner in enumerate(targets.owners) if owner in members]
                positions = token_contributions.exact(
                    source,
                    [generations[m].encoded for m in members] + [targets.texts[t] for t in chosen],
                    [weight * share for share in self._shares(members)]
                    + [weight * targets.weights[t] for t in chosen],
                    [*range(len(members)), *(members.index(targets.owners[t]) for t in chosen)],
                    [self._example(source, row) for row in hits],
                    self._scoring.normalize,
                    self._progress("exact gradients", done, total),
                    by_position=by_position,
                )
                done += len(hits) * len(source.points)
                for row, by_query in zip(hits, positions, strict=True):
                    whole = by_query[: len(members)].sum(0, keepdim=True)
                    _add(contributions[n], row, torch.cat([whole, by_query[len(members) :]]))
        return contributions

    def sketched(self, results: Sequence[QueryResult]) -> list[Contributions]:
        """The contributions to the scores that the caches would give if they stored sketches uncompressed."""
        hits = [sorted({hit.row for hit in (*result.top, *result.bottom)}) for result in results]
        rows = sorted({row for chosen in hits for row in chosen})
        contributions: list[Contributions] = [{} for _ in results]
        targets = target_slices([len(result.targets) for result in results])
        for number, source in self._each_source():
            query = self._scans[number].query
            report = self._progress("tokens of hits", 0, len(rows))
            report(0)
            factors = None if query.factors is None else [query.factors[row] for row in rows]
            texts = [self._example(source, row) for row in rows]
            found = token_contributions.sketched(source, texts, query, factors, report)
            for row, positions in zip(rows, found, strict=True):
                for n, chosen in enumerate(hits):
                    if row in chosen:
                        of_query = torch.cat([positions[n : n + 1], positions[targets[n]]])
                        _add(contributions[n], row, of_query.double())
        return contributions

    def with_tokens(
        self, results: Sequence[QueryResult], contributions: Sequence[Contributions]
    ) -> list[QueryResult]:
        """The results with the contribution of each token of their hits."""
        return [
            replace(
                result,
                top=[replace(hit, tokens=self._tokens(hit.row, known[hit.row])) for hit in result.top],
                bottom=[replace(hit, tokens=self._tokens(hit.row, known[hit.row])) for hit in result.bottom],
            )
            for result, known in zip(results, contributions, strict=True)
        ]

    def _tokens(self, row: int, contributions: Tensor) -> Tokens:
        """The tokens of a hit with their contributions [1 + targets, T]."""
        _, counts, pieces = self._texts[row]
        by_target = contributions[1:].float().numpy() if len(contributions) > 1 else None
        return Tokens(tuple(pieces), tuple(counts), tuple(contributions[0].tolist()), by_target)

    def _each_source(self) -> Iterable[tuple[int, GradientSource]]:
        for number in range(len(self._query.sketches)):
            source = self._sources(number)
            if source.loaded.sharded:
                raise UserError(
                    "token contributions and exact gradients need an unsharded model",
                    "leave out `shard_model`, or what needs them",
                )
            yield number, source

    def _shares(self, members: Sequence[int]) -> list[float]:
        """The share of each generation in the target set of all of them."""
        if not self._scoring.together:
            return [1.0]
        return weights_of(self._query.texts, members).tolist()

    def _example(self, source: GradientSource, row: int) -> AnyExample:
        text = source.example(self._data.get(row))
        if not source.task.has_tokens:
            return text
        ids, counts = source.task.tokens(text)
        if row not in self._texts:
            self._texts[row] = ids, counts, source.encoder.pieces(ids)
        elif self._texts[row][0] != ids:
            raise UserError(
                "the models of these caches read a text as different tokens", "query one of them alone"
            )
        return text

    def _progress(self, stage: str, before: int, total: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            if self._on_stage is not None:
                self._on_stage(stage, before + done, total)

        return report


def target_slices(counts: Sequence[int]) -> list[slice]:
    """The positions of each generation's targets among all queries, which come after the generations; counts:
    the number of targets of each generation."""
    edges = list(accumulate(counts, initial=len(counts)))
    return [slice(*pair) for pair in pairwise(edges)]


def order_by_exact(ends: Ends, exact: Sequence[Contributions], top_k: int) -> Ends:
    """The ends with the first queries, which have exact scores, in the order of these."""
    reordered = []
    for (scores, rows), sign in zip(ends, (-1, 1), strict=True):
        scores, rows = scores[:, :top_k].clone(), rows[:, :top_k].clone()
        for n, by_row in enumerate(exact):
            order = sorted((sign * float(by_row[row][0].sum()), row) for row in by_row)[:top_k]
            rows[n] = -1
            rows[n, : len(order)] = torch.tensor([row for _, row in order], device="cpu")
            scores[n, : len(order)] = torch.tensor([sign * score for score, _ in order], device="cpu")
        reordered.append((scores, rows))
    return reordered[0], reordered[1]


def _add(contributions: Contributions, row: int, more: Tensor) -> None:
    contributions[row] = contributions[row] + more if row in contributions else more
