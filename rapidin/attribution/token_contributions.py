"""What each token of a training example contributes to its exact score, and exact scores.

A linear layer's gradient for an example is ``sum_t g_t a_t^T`` over the positions t at which the model reads
tokens. Its product with a query is a sum over positions too, and so is a score. The contribution of a
position comes from its activations and the gradients that arrive there, whichever tokens' losses those come
from: also in a prompt, which has no loss itself.

*Sketched* products are those of the cache, recomputed position by position (`hit_gradients`). *Exact* ones,
here, need no sketch: with a query's gradient ``sum_s h_s b_s^T`` a position contributes
``sum_s <g_t, h_s> <a_t, b_s>`` (`rapidin.gradients.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rapidin.attribution.normalization import (
    divide,
    of_directions,
    query_divisors,
    row_factors,
    score_divisor,
    whole_lengths,
)
from rapidin.cache.codec.plan import typical_length
from rapidin.data.encoding import AnyExample
from rapidin.errors import UserError
from rapidin.gradients.exact import ExactGradient, ExactQueries, lengths_of
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch
from rapidin.tasks.task import AnyBatch

MEMORY_BYTES = 512 << 20  # of products, or of the queries' exact gradients, in memory at a time

OnText = Callable[[int], None]


def all_seen(batch: AnyBatch) -> AnyBatch:
    """A batch with an output head that sees all positions."""
    return replace(batch, first=0) if isinstance(batch, TokenBatch) else batch


def no_tokens(error: TypeError) -> UserError:
    """What to say of a gradient that does not come position by position."""
    return UserError(str(error), "leave out `contributions`, or that parameter of the cache with `exclude`")


def exact_gradients(
    source: GradientSource, text: AnyExample, point: int, *, by_position: bool = False
) -> list[ExactGradient]:
    """The gradient of each parameter for one text, at the model's present weights."""
    batch = all_seen(source.task.batch([text], source.loaded.device))
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
    contributes to them, [Q, T]. Those of `weighted` are not divided by the mean over the rows.

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
                        if of_directions(normalize) == "layer":
                            scale = divide(scale, text_lengths[n, of_point])
                        if normalize == "layer":
                            scale = divide(scale, owner_lengths * score_divisor(blocks, normalize))
                        for m, gradient in enumerate(gradients):
                            if by_position:
                                products = exact_queries.position_products(m, gradient, text.length)
                            else:
                                products = exact_queries.products(m, gradient)[:, None]
                            sums[n][chunk] += products * scale[:, m, None]
                        done += 1
                        on_text(done)
    except TypeError as error:
        raise no_tokens(error) from None
    scales = torch.tensor(list(weights), dtype=torch.float64, device="cpu").expand(len(texts), -1)
    if normalize in ("cosine", "weighted"):  # divisors of whole gradients, of all points
        scales = divide(scales, query_divisors(query_lengths[list(owners)], normalize)[:, :1].T)
    if normalize == "cosine":
        scales = divide(scales, whole_lengths(text_lengths))
    if normalize == "weighted":
        scales = scales * row_factors(typical_length(text_lengths))
    for of_text, scale in zip(sums, scales, strict=True):
        of_text *= scale[:, None]
    return sums


def _zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.float64, device="cpu")
