"""What each token of a training example contributes to its score, and scores of exact gradients.

A linear layer's gradient for an example is ``sum_t g_t a_t^T`` over the positions t at which the model reads
tokens. Its product with a query is a sum over positions too, and so is a score. The contribution of a
position comes from its activations and the gradients that arrive there, whichever tokens' losses those come
from: also in a prompt, which has no loss itself.

*Sketched* products are those of the cache, recomputed position by position. *Exact* ones need no sketch: with
a query's gradient ``sum_s h_s b_s^T`` a position contributes ``sum_s <g_t, h_s> <a_t, b_s>``
(`rapidin.gradients.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin.attribution.normalization import divide, divisors, score_divisor, whole_lengths
from rapidin.data.encoding import AnyExample, by_length
from rapidin.errors import UserError
from rapidin.gradients.exact import ExactGradient, ExactQueries, lengths_of
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch
from rapidin.tasks.task import AnyBatch

if TYPE_CHECKING:
    from rapidin.attribution.methods import ScanQuery

MEMORY_BYTES = 512 << 20  # of products, or of the queries' exact gradients, in memory at a time

OnText = Callable[[int], None]


def _all_seen(batch: AnyBatch) -> AnyBatch:
    """The batch with an output head that sees all positions."""
    return replace(batch, first=0) if isinstance(batch, TokenBatch) else batch


def _no_tokens(error: TypeError) -> UserError:
    return UserError(str(error), "leave out `contributions`, or that parameter of the cache with `exclude`")


def sketched(
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
            for n, products in _sketched(source, texts, chosen, some, query.normalize, factors):
                found[n].append(products)
        done += len(chosen)
        on_text(done)
    return [torch.cat(of_text) for of_text in found]


def _sketched(
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
        scale = divide(1.0, divisors(torch.cat(lengths[n]), normalize))
        own = None if factors is None else factors[n]
        if own is not None:
            scale = scale * own.to(scale)
        yield n, (torch.cat(products[n], 2).double() @ scale).T.float().cpu()


def _positions(
    source: GradientSource, vectors: Tensor, number: int, batch: AnyBatch
) -> tuple[Tensor, Tensor]:
    """`GradientSketcher.positions` of a batch, whose output head sees all positions."""
    try:
        return source.sketcher.positions(_all_seen(batch), vectors, number)
    except TypeError as error:
        raise _no_tokens(error) from None


# ------------------------------------------------------------------------------------------------- exact


def exact_gradients(
    source: GradientSource, text: AnyExample, point: int, *, by_position: bool = False
) -> list[ExactGradient]:
    """The gradient of each parameter for one text, at the model's present weights."""
    batch = _all_seen(source.task.batch([text], source.loaded.device))
    return source.sketcher.exact(batch, point, by_position=by_position)


def chunks(
    source: GradientSource, queries: Sequence[AnyExample], point: int, memory_bytes: int
) -> Iterator[tuple[slice, ExactQueries]]:
    """Ranges of queries with their gradients, which take about `memory_bytes` together, at least one at a
    time."""
    first, total = 0, 0
    held: list[list[ExactGradient]] = []
    for n, query in enumerate(queries):
        gradients = [gradient.smallest() for gradient in exact_gradients(source, query, point)]
        size = 4 * sum(gradient.elements for gradient in gradients)
        if held and total + size > memory_bytes:
            yield slice(first, n), ExactQueries(held)
            first, total, held = n, 0, []
        held.append(gradients)
        total += size
    yield slice(first, len(queries)), ExactQueries(held)


def exact(
    source: GradientSource,
    queries: Sequence[AnyExample],
    weights: Sequence[float],
    owners: Sequence[int],
    texts: Sequence[AnyExample],
    normalize: str,
    on_text: OnText = lambda _: None,
    memory_bytes: int = MEMORY_BYTES,
    *,
    by_position: bool = False,
) -> list[Tensor]:
    """The exact scores of each text by `dot`: [Q, 1] float64 for each text, or what each position of it
    contributes to them, [Q, T].

    queries: with the weights that their losses are multiplied by; owners: the query by whose lengths each
    query is normalized: itself, or an earlier one that it is a target of. on_text: called with the number of
    passes over texts that are done; memory_bytes: of the queries' gradients that are held at a time. Raises
    UserError for a gradient that does not come position by position, if it has to.
    """
    layers = len(source.targets)
    blocks = layers * len(source.points)
    queries, texts = source.prepared(queries), source.prepared(texts)
    sums = [_zeros(len(queries), text.length if by_position else 1) for text in texts]
    query_lengths, text_lengths = (_zeros(len(some), blocks) for some in (queries, texts))
    done = 0
    try:
        for number in range(len(source.points)):
            of_point = slice(number * layers, (number + 1) * layers)
            with source.at(number):
                for chunk, exact_queries in chunks(source, queries, number, memory_bytes):
                    query_lengths[chunk, of_point] = exact_queries.lengths
                    owner_lengths = query_lengths[list(owners[chunk]), of_point]
                    for n, text in enumerate(texts):
                        gradients = exact_gradients(source, text, number, by_position=by_position)
                        text_lengths[n, of_point] = lengths_of(gradients)
                        scale = torch.ones_like(owner_lengths)
                        if normalize == "layer":
                            both = owner_lengths * text_lengths[n, of_point]
                            scale = divide(1.0, both * score_divisor(blocks, normalize))
                        for m, gradient in enumerate(gradients):
                            if by_position:
                                products = exact_queries.position_products(m, gradient, text.length)
                            else:
                                products = exact_queries.products(m, gradient)[:, None]
                            sums[n][chunk] += products * scale[:, m, None]
                        done += 1
                        on_text(done)
    except TypeError as error:
        raise _no_tokens(error) from None
    scales = torch.tensor(list(weights), dtype=torch.float64, device="cpu").expand(len(texts), -1)
    if normalize == "cosine":
        scales = divide(scales, whole_lengths(query_lengths[list(owners)]).T)
        scales = divide(scales, whole_lengths(text_lengths))
    for of_text, scale in zip(sums, scales, strict=True):
        of_text *= scale[:, None]
    return sums


def _zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.float64, device="cpu")
