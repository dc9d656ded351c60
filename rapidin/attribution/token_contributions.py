"""What each token of a training example contributes to its score, and scores of exact gradients.

A linear layer's gradient for an example is ``sum_t g_t a_t^T`` over the positions t at which the model reads
tokens. Its product with a query is a sum over positions too, and so is a score. The contribution of a
position comes from its activations and the gradients that arrive there, whichever tokens' losses those come
from: also in a prompt, which has no loss itself.

*Sketched* products are those of the cache, recomputed position by position. *Exact* ones need no sketch: with
a query's gradient ``sum_s h_s b_s^T`` a position contributes ``sum_s <g_t, h_s> <a_t, b_s>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin.attribution.normalization import divide, divisors, score_divisor, whole_lengths
from rapidin.data.encoding import AnyExample
from rapidin.errors import UserError
from rapidin.gradients.parameters import matrix_shape
from rapidin.gradients.source import GradientSource
from rapidin.tasks.causal import TokenBatch
from rapidin.tasks.task import AnyBatch

if TYPE_CHECKING:
    from rapidin.attribution.methods import ScanQuery

MEMORY_BYTES = 512 << 20  # of products, or of the queries' exact gradients, in memory at a time

OnText = Callable[[int], None]
Factors = list[tuple[Tensor, Tensor]]  # columns [T, I] and rows [T, O] of each parameter, for one text


def _batch(source: GradientSource, text: AnyExample) -> AnyBatch:
    batch: AnyBatch = source.task.batch([text], source.loaded.device)
    if isinstance(batch, TokenBatch):
        batch = replace(batch, first=0)  # so that the output head sees all positions
    return batch


def _not_linear(error: TypeError) -> UserError:
    return UserError(str(error), "make a cache of linear layers' weights only: see `include`")


def sketched(
    source: GradientSource,
    text: AnyExample,
    query: ScanQuery,
    factors: Tensor | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Tensor:
    """What each position of a training example contributes to its scores: [Q, T] float32 on the CPU.

    text: the example; query: what the cache is scanned for; factors: `ScanQuery.factors` of its row [blocks];
    memory_bytes: of the products that are held at a time.
    The sums over positions are the scores that the cache would give if it stored sketches uncompressed.
    Raises UserError if a gradient is not a sum over tokens.
    """
    vectors = query.vectors.to(source.loaded.device)
    bytes_per_query = 4 * text.length * len(source.targets) * len(source.points)
    size = max(1, memory_bytes // bytes_per_query)
    return torch.cat(
        [_sketched(source, text, some, query.normalize, factors) for some in torch.split(vectors, size)]
    )


def _sketched(
    source: GradientSource, text: AnyExample, vectors: Tensor, normalize: str, factors: Tensor | None
) -> Tensor:
    sketcher, count = source.sketcher, len(source.targets)
    products, lengths = [], []
    for number in range(len(source.points)):
        if sketcher.blocks == count:
            of_point = vectors[:, number * count : (number + 1) * count]
        else:  # one block: the sum of all parameters' sketches, each at length 1
            of_point = vectors[:, number : number + 1].expand(-1, count, -1)
        try:
            with source.at(number):
                product, sketch = sketcher.positions(_batch(source, text), of_point, number)
        except TypeError as error:
            raise _not_linear(error) from None
        if sketcher.blocks != count:
            scale = divide(1.0, sketch.norm(dim=1))
            product = (product * scale).sum(2, keepdim=True)
            sketch = (sketch * scale[:, None]).sum(0, keepdim=True)
        products.append(product)
        lengths.append(sketch.double().norm(dim=1))
    product = torch.cat(products, 2).double()
    scale = divide(1.0, divisors(torch.cat(lengths), normalize))
    if factors is not None:
        scale = scale * factors.to(scale)
    return (product @ scale).T.float().cpu()


# ------------------------------------------------------------------------------------------------- exact


@dataclass(frozen=True)
class _Gradients:
    """The gradients of some queries for one parameter.

    formed: the gradients [Q, O, I], or None. Else the factors of all positions of all queries, concatenated:
    columns [S, I], rows [S, O], and owner [S], the query of each position.
    """

    formed: Tensor | None
    columns: Tensor
    rows: Tensor
    owner: Tensor
    queries: int

    @staticmethod
    def of(factors: Sequence[tuple[Tensor, Tensor]]) -> _Gradients:
        """From the (columns [S, I], rows [S, O]) of each query."""
        columns, rows = torch.cat([c for c, _ in factors]), torch.cat([r for _, r in factors])
        sizes = torch.tensor([len(c) for c, _ in factors], device=columns.device)
        owner = torch.repeat_interleave(torch.arange(len(factors), device=columns.device), sizes)
        formed = None
        if len(factors) * rows.shape[1] * columns.shape[1] < columns.numel() + rows.numel():
            formed = torch.stack([r.float().T @ c.float() for c, r in factors])
            columns, rows = columns[:0], rows[:0]
        return _Gradients(formed, columns, rows, owner, len(factors))

    def products(self, columns: Tensor, rows: Tensor) -> Tensor:
        """Inner products with ``rows_t columns_t^T`` of each position of a text, [T, I] and [T, O]: [Q, T]
        float32."""
        columns, rows = columns.float(), rows.float()
        if self.formed is not None:
            return torch.einsum("to,qoi,ti->qt", rows, self.formed, columns)
        pairs = (rows @ self.rows.float().T) * (columns @ self.columns.float().T)
        return pairs.new_zeros(self.queries, len(rows)).index_add_(0, self.owner, pairs.T)


def length_of(columns: Tensor, rows: Tensor) -> float:
    """The length of ``sum_t rows_t columns_t^T``, for columns [T, I] and rows [T, O]."""
    columns, rows = columns.float(), rows.float()
    t, o, i = len(rows), rows.shape[1], columns.shape[1]
    if o * i < t * (o + i):
        return float((rows.T @ columns).double().norm())
    # Rounding may make this sum of squares slightly negative.
    return float(((rows @ rows.T) * (columns @ columns.T)).double().sum().clamp(min=0).sqrt())


def lengths_of(factors: Factors) -> Tensor:
    """The `length_of` each parameter's gradient: [parameters] float64."""
    return torch.tensor(
        [length_of(columns, rows) for columns, rows in factors], dtype=torch.float64, device="cpu"
    )


class ExactQueries:
    """The exact gradients of some queries, to compare with those of other texts.

    lengths: [Q, parameters] float64.
    """

    def __init__(self, factors: Iterable[Factors]) -> None:
        """factors: those of each query."""
        by_parameter: list[Factors] = []
        lengths = []
        for of_query in factors:
            by_parameter = by_parameter or [[] for _ in of_query]
            for pairs, pair in zip(by_parameter, of_query, strict=True):
                pairs.append(pair)
            lengths.append(lengths_of(of_query))
        self._gradients = [_Gradients.of(pairs) for pairs in by_parameter]
        self.lengths = torch.stack(lengths)

    def products(self, parameter: int, columns: Tensor, rows: Tensor) -> Tensor:
        """Inner products with each position of another text, by its factors [T, I] and [T, O] for the
        parameter: [Q, T]."""
        return self._gradients[parameter].products(columns, rows)

    def compare(self, parameter: int, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines [Q, B], lengths [B]), float32, with the gradients of other texts, by their factors
        [B, T, I] and [B, T, O] for the parameter."""
        pairs = list(zip(columns, rows, strict=True))
        length = torch.tensor([length_of(*pair) for pair in pairs], dtype=torch.float64, device="cpu")
        products = torch.stack([self.products(parameter, *pair).double().sum(1).cpu() for pair in pairs], 1)
        return divide(products, self.lengths[:, parameter, None] * length).float(), length.float()


def factors_of(source: GradientSource, text: AnyExample, point: int) -> Factors:
    """(columns [T, I], rows [T, O]) of each parameter for one text, at the model's present weights."""
    return [(c[0], r[0]) for c, r in source.sketcher.factors(_batch(source, text), point)]


def query_bytes(source: GradientSource, query: AnyExample) -> int:
    """The bytes of a query's exact gradient at one point."""
    sizes = [matrix_shape(target.shape) for target in source.targets if len(target.shape) >= 2]
    if not source.task.has_tokens:
        return sum(4 * o * i for o, i in sizes)
    return sum(4 * min(o * i, query.length * (o + i)) for o, i in sizes)


def chunks(source: GradientSource, queries: Sequence[AnyExample], memory_bytes: int) -> Iterator[slice]:
    """Ranges of queries whose exact gradients fit into `memory_bytes` together, at least one at a time."""
    first, total = 0, 0
    for n, query in enumerate(queries):
        size = query_bytes(source, query)
        if n > first and total + size > memory_bytes:
            yield slice(first, n)
            first, total = n, 0
        total += size
    yield slice(first, len(queries))


def exact(
    source: GradientSource,
    queries: Sequence[AnyExample],
    weights: Sequence[float],
    owners: Sequence[int],
    texts: Sequence[AnyExample],
    normalize: str,
    on_text: OnText = lambda _: None,
    memory_bytes: int = MEMORY_BYTES,
) -> list[Tensor]:
    """What each position of each text contributes to its exact scores by `dot`: [Q, T] float64 for each text,
    [Q, 1] for a task whose layers do not all see the same positions.

    queries: with the weights that their losses are multiplied by; owners: the query by whose lengths each
    query is normalized: itself, or the one that it is a target of. on_text: called with the number of passes
    over texts that are done; memory_bytes: of the queries' gradients that are held at a time. Raises
    UserError if the gradient of a parameter that is not the weight of a linear layer is taken.
    """
    layers = len(source.targets)
    blocks = layers * len(source.points)
    queries, texts = source.prepared(queries), source.prepared(texts)
    sums = [
        torch.zeros(
            len(queries), text.length if source.task.has_tokens else 1, dtype=torch.float64, device="cpu"
        )
        for text in texts
    ]
    query_lengths, text_lengths = (
        torch.zeros(len(some), blocks, dtype=torch.float64, device="cpu") for some in (queries, texts)
    )
    done = 0
    try:
        for number in range(len(source.points)):
            of_point = slice(number * layers, (number + 1) * layers)
            with source.at(number):
                for n, query in enumerate(queries):
                    if owners[n] == n:
                        query_lengths[n, of_point] = lengths_of(factors_of(source, query, number))
                for chunk in chunks(source, queries, memory_bytes):
                    exact_queries = ExactQueries(
                        factors_of(source, query, number) for query in queries[chunk]
                    )
                    owner_lengths = query_lengths[list(owners[chunk]), of_point]
                    for n, text in enumerate(texts):
                        factors = factors_of(source, text, number)
                        text_lengths[n, of_point] = lengths_of(factors)
                        scale = torch.ones_like(owner_lengths)
                        if normalize == "layer":
                            both = owner_lengths * text_lengths[n, of_point]
                            scale = divide(1.0, both * score_divisor(blocks, normalize))
                        _add_products(sums[n][chunk], exact_queries, factors, scale)
                        done += 1
                        on_text(done)
    except TypeError as error:
        raise _not_linear(error) from None
    scales = torch.tensor(list(weights), dtype=torch.float64, device="cpu").expand(len(texts), -1)
    if normalize == "cosine":
        scales = divide(scales, whole_lengths(query_lengths[list(owners)]).T)
        scales = divide(scales, whole_lengths(text_lengths))
    for of_text, scale in zip(sums, scales, strict=True):
        of_text *= scale[:, None]
    return sums


def _add_products(sums: Tensor, queries: ExactQueries, factors: Factors, scale: Tensor) -> None:
    """Adds to sums [Q, T] the products of queries with each position of a text, by its factors; scale: of
    each query and parameter, [Q, parameters]."""
    for n, (columns, rows) in enumerate(factors):
        products = queries.products(n, columns, rows).double().cpu()
        if sums.shape[1] == 1:
            products = products.sum(1, keepdim=True)
        sums += products * scale[:, n, None]
