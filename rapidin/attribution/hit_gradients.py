"""The gradients of hits, computed again: exact scores, and what each token of a hit contributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rapidin.attribution import token_contributions
from rapidin.attribution.methods import ScanQuery
from rapidin.attribution.methods.vectors import known_normalization, mean_factor
from rapidin.attribution.normalization import divide, row_divisors
from rapidin.attribution.options import ScoringConfig
from rapidin.attribution.query_sketch import OnStage, Query, target_texts, weights_of
from rapidin.attribution.scan import Ends
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.attribution.token_contributions import MEMORY_BYTES, OnText, all_seen, no_tokens
from rapidin.data.encoding import AnyExample, by_length
from rapidin.data.examples import Examples
from rapidin.errors import UserError
from rapidin.gradients.source import GradientSource
from rapidin.results.types import QueryResult, Tokens
from rapidin.tasks.task import AnyBatch

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
            sketch = self._query.sketches[number]
            normalize = known_normalization(sketch.cache, self._scoring.normalize)
            weight = sketch.weight / mean_factor(sketch.cache, normalize)
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
                    normalize,
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
            found = sketched_contributions(source, texts, query, factors, report)
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


def sketched_contributions(
    source: GradientSource,
    texts: Sequence[AnyExample],
    query: ScanQuery,
    factors: Sequence[Tensor | None] | None = None,
    on_text: OnText = lambda _: None,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Tensor]:
    """What each position of training examples contributes to their scores: [Q, T] float32 on the CPU for each
    example.

    texts: the examples; query: what the cache is scanned for; factors: `ScanQuery.factors` of their rows, of
    each [blocks] or None; on_text: called with the number of examples that are done; memory_bytes: of the
    products that are held at a time.
    The sums over positions are the scores that the cache would give if it stored sketches uncompressed.
    Raises UserError if a gradient is not a sum over tokens, or if an example does not fit into memory.
    """
    vectors = query.vectors.to(source.loaded.device)
    texts = source.prepared(texts)
    # Products take memory by tokens and by queries. Shorter batches cost less than passes for some queries.
    longest = max((text.length for text in texts), default=1)
    bytes_per_product = 4 * len(source.targets) * len(source.points)
    together = max(longest, memory_bytes // (bytes_per_product * len(vectors)))
    size = max(1, memory_bytes // (bytes_per_product * longest))
    some_vectors = torch.split(vectors, size)
    found: list[list[Tensor]] = [[] for _ in texts]
    done = 0
    for chosen in by_length(range(len(texts)), texts, min(together, source.batches.batch_tokens)):
        for some in some_vectors:
            for n, products in _of_batch(source, texts, chosen, some, query.normalize, factors):
                found[n].append(products)
        done += len(chosen)
        on_text(done)
    return [torch.cat(of_text) for of_text in found]


def _of_batch(
    source: GradientSource,
    texts: Sequence[AnyExample],
    chosen: Sequence[int],
    vectors: Tensor,
    normalize: str,
    factors: Sequence[Tensor | None] | None,
) -> Iterator[tuple[int, Tensor]]:
    """The number of each of the chosen texts, with its contributions [Q, T]."""
    sketcher, count = source.sketcher, len(source.targets)
    products: dict[int, list[Tensor]] = {n: [] for n in chosen}
    lengths: dict[int, list[Tensor]] = {n: [] for n in chosen}
    for number in range(len(source.points)):
        if sketcher.blocks == count:
            of_point = vectors[:, number * count : (number + 1) * count]
        else:  # one block: the sum of all parameters' sketches, each at length 1
            of_point = vectors[:, number : number + 1].expand(-1, count, -1)
        step = partial(_positions, source, of_point, number)
        with source.at(number):
            for numbers, result in source.batches.run(chosen, texts, step):
                if result is None:
                    raise UserError(
                        "a hit does not fit into memory with what each token contributes",
                        "leave out `contributions`",
                    )
                for n, product, sketch in zip(numbers, *result, strict=True):
                    product = product[: texts[n].length]  # the others are padding
                    if sketcher.blocks != count:
                        scale = divide(1.0, sketch.norm(dim=1))
                        product = (product * scale).sum(2, keepdim=True)
                        sketch = (sketch * scale[:, None]).sum(0, keepdim=True)
                    products[n].append(product)
                    lengths[n].append(sketch.double().norm(dim=1))
    for n in chosen:
        scale = divide(1.0, row_divisors(torch.cat(lengths[n]), normalize))
        own = None if factors is None else factors[n]
        if own is not None:
            scale = scale * own.to(scale)
        yield n, (torch.cat(products[n], 2).double() @ scale).T.float().cpu()


def _positions(
    source: GradientSource, vectors: Tensor, number: int, batch: AnyBatch
) -> tuple[Tensor, Tensor]:
    """`GradientSketcher.positions` of a batch, whose output head sees all positions."""
    try:
        return source.sketcher.positions(all_seen(batch), vectors, number)
    except TypeError as error:
        raise no_tokens(error) from None


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
