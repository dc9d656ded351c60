"""The gradients of hits, computed again: exact scores, and what each token of a hit contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rapidin.attribution import token_contributions
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import Query, target_texts, weights_of
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.data.encoding import Encoded
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.gradients.source import GradientSource
from rapidin.results.types import QueryResult, Tokens

OnStage = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
SourceOf = Callable[[int], GradientSource]  # of each of a query's sketches, by its number

# By row of a hit: what each position of the example contributes to its score, and to the parts of the score
# that targets have: [1 + targets, T] float64.
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
        self._texts: dict[int, tuple[Encoded, list[str]]] = {}  # hits by row, and the texts of their tokens

    def exact(self, rows: Sequence[Sequence[int]]) -> list[Contributions]:
        """The contributions to exact scores, of these rows for each that has hits of its own."""
        generations = self._query.texts
        found: list[Contributions] = [{} for _ in rows]
        for number, source in self._each_source():
            weight = self._query.sketches[number].weight
            targets = target_texts(generations, source.settings.loss)
            total = sum(map(len, rows)) * len(source.points)
            done = 0
            for n, chosen in enumerate(rows):
                members = range(len(generations)) if self._scoring.together else [n]
                own = [t for t, owner in enumerate(targets.owners) if owner in members]
                positions = token_contributions.exact(
                    source,
                    [generations[m].encoded for m in members] + [targets.texts[t] for t in own],
                    [weight * share for share in self._shares(members)]
                    + [weight * targets.weights[t] for t in own],
                    [*range(len(members)), *(members.index(targets.owners[t]) for t in own)],
                    [self._encoded(source, row) for row in chosen],
                    self._scoring.normalize,
                    self._progress("exact gradients", done, total),
                )
                done += len(chosen) * len(source.points)
                for row, parts in zip(chosen, positions, strict=True):
                    whole = parts[: len(members)].sum(0, keepdim=True)
                    _add(found[n], row, torch.cat([whole, parts[len(members) :]]))
        return found

    def sketched(self, results: Sequence[QueryResult]) -> list[Contributions]:
        """The contributions to the scores that the caches would give if they kept sketches whole."""
        hits = [sorted({hit.row for hit in (*result.top, *result.bottom)}) for result in results]
        rows = sorted({row for chosen in hits for row in chosen})
        found: list[Contributions] = [{} for _ in results]
        targets = target_slices([len(result.targets) for result in results])
        for number, source in self._each_source():
            query = self._scans[number].query
            report = self._progress("tokens of hits", 0, len(rows))
            for done, row in enumerate(rows):
                factors = None if query.factors is None else query.factors[row]
                positions = token_contributions.sketched(source, self._encoded(source, row), query, factors)
                for n, chosen in enumerate(hits):
                    if row in chosen:
                        parts = torch.cat([positions[n : n + 1], positions[targets[n]]])
                        _add(found[n], row, parts.double())
                report(done + 1)
        return found

    def with_tokens(
        self, results: Sequence[QueryResult], contributions: Sequence[Contributions]
    ) -> list[QueryResult]:
        """The results, their hits with what each of their tokens contributes."""
        return [
            replace(
                result,
                top=[replace(hit, tokens=self._tokens(hit.row, known[hit.row])) for hit in result.top],
                bottom=[replace(hit, tokens=self._tokens(hit.row, known[hit.row])) for hit in result.bottom],
            )
            for result, known in zip(results, contributions, strict=True)
        ]

    def _tokens(self, row: int, parts: Tensor) -> Tokens:
        text, pieces = self._texts[row]
        by_target = parts[1:].float().numpy() if len(parts) > 1 else None
        return Tokens(tuple(pieces), tuple(text.target), tuple(parts[0].tolist()), by_target)

    def _each_source(self) -> Iterable[tuple[int, GradientSource]]:
        for number in range(len(self._query.sketches)):
            source = self._sources(number)
            if source.loaded.sharded:
                raise UserError(
                    "token contributions and exact gradients need an unsharded model",
                    "leave out --shard-model, or what needs them",
                )
            yield number, source

    def _shares(self, members: Sequence[int]) -> list[float]:
        """Of each generation in the target set of all of them."""
        if not self._scoring.together:
            return [1.0]
        return weights_of(self._query.texts, members).tolist()

    def _encoded(self, source: GradientSource, row: int) -> Encoded:
        text = source.encoder.example(self._data.get(row))
        if row not in self._texts:
            self._texts[row] = text, source.encoder.pieces(text.ids)
        elif self._texts[row][0].ids != text.ids:
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
    """Of generations with so many targets each, where theirs are among all queries: after the generations."""
    edges = list(accumulate(counts, initial=len(counts)))
    return [slice(*pair) for pair in pairwise(edges)]


def _add(found: Contributions, row: int, parts: Tensor) -> None:
    found[row] = found[row] + parts if row in found else parts
