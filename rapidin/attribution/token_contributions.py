"""Inside of texts: what each token of a training example brings to its score, and scores of exact gradients.

A linear layer's gradient for an example is ``sum_t g_t a_t^T``, over the positions where the model reads its
tokens: so is its product with a query, and a score is a sum over positions. What a position brings is what
its activations and the gradients that arrive there make together, whichever tokens' losses they come from:
of a prompt, too, whose own loss does not count.

*Sketched* products are those that the cache holds, taken again position by position. *Exact* ones need no
sketch: with a query's gradient ``sum_s h_s b_s^T`` a position brings ``sum_s <g_t, h_s> <a_t, b_s>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rapidin.data.encoding import Encoded
from rapidin.errors import UserError
from rapidin.gradients.batch import Batch
from rapidin.gradients.source import GradientSource

if TYPE_CHECKING:
    from rapidin.attribution.methods import ScanQuery

_BYTES = 512 << 20  # of products, or of the queries' exact gradients, that are held at a time

OnText = Callable[[int], None]
Factors = list[tuple[Tensor, Tensor]]  # columns [T, I] and rows [T, O] of each target, for one text


def _batch(source: GradientSource, text: Encoded) -> Batch:
    batch = Batch.of([(text.ids, text.target)], source.loaded.device)
    return replace(batch, first=0)  # or the output head would not see all positions


def _wrong(error: TypeError) -> UserError:
    return UserError(str(error), "make a cache of linear layers' weights alone: see --include")


def sketched(
    source: GradientSource, text: Encoded, query: ScanQuery, factors: Tensor | None = None
) -> Tensor:
    """What each position of a training example brings to its scores: [Q, T] float32 on the CPU.

    text: the example; query: what the cache is scanned for; factors: `ScanQuery.factors` of its row [blocks].
    They sum to the scores that the cache would have if it kept its sketches whole. Raises UserError where a
    gradient does not come token by token.
    """
    vectors = query.vectors.to(source.loaded.device)
    each = 4 * len(text.ids) * len(source.targets) * len(source.points)
    size = max(1, _BYTES // each)
    found = [
        _sketched(source, text, chosen, query.normalize, factors) for chosen in torch.split(vectors, size)
    ]
    return torch.cat(found)


def _sketched(
    source: GradientSource, text: Encoded, vectors: Tensor, normalize: str, factors: Tensor | None
) -> Tensor:
    sketcher, count = source.sketcher, len(source.targets)
    products, lengths = [], []
    for number in range(len(source.points)):
        if sketcher.blocks == count:
            mine = vectors[:, number * count : (number + 1) * count]
        else:  # one block: the sum of all targets' sketches, each at length 1
            mine = vectors[:, number : number + 1].expand(-1, count, -1)
        try:
            with source.at(number):
                product, sketch = sketcher.positions(_batch(source, text), mine, number)
        except TypeError as error:
            raise _wrong(error) from None
        if sketcher.blocks != count:
            length = sketch.norm(dim=1)
            unit = torch.where(length > 0, 1 / length, 0.0)
            product = (product * unit).sum(2, keepdim=True)
            sketch = (sketch * unit[:, None]).sum(0, keepdim=True)
        products.append(product)
        lengths.append(sketch.double().norm(dim=1))
    product, length = torch.cat(products, 2).double(), torch.cat(lengths)
    scale = _scale(length, normalize)
    if factors is not None:
        scale = scale * factors.to(scale)
    return (product @ scale).T.float().cpu()


def _scale(length: Tensor, normalize: str) -> Tensor:
    """What the blocks of a row [blocks] with these lengths are multiplied by, as `methods` has it."""
    if normalize == "none":
        return torch.ones_like(length)
    if normalize == "cosine":
        length = length.norm().expand_as(length)
    return torch.where(length > 0, 1 / length, 0.0)


# ------------------------------------------------------------------------------------------------- exact


@dataclass(frozen=True)
class _Gradients:
    """One target's gradients of some queries: formed [Q, O, I], or the factors of all their positions one
    after another (columns [S, I], rows [S, O]) with the query of each [S]."""

    formed: Tensor | None
    columns: Tensor
    rows: Tensor
    owner: Tensor
    queries: int

    @staticmethod
    def of(factors: Sequence[tuple[Tensor, Tensor]]) -> _Gradients:
        """Of each query's (columns [S, I], rows [S, O])."""
        columns, rows = torch.cat([c for c, _ in factors]), torch.cat([r for _, r in factors])
        sizes = torch.tensor([len(c) for c, _ in factors], device=columns.device)
        owner = torch.repeat_interleave(torch.arange(len(factors), device=columns.device), sizes)
        formed = None
        if len(factors) * rows.shape[1] * columns.shape[1] < columns.numel() + rows.numel():
            formed = torch.stack([r.float().T @ c.float() for c, r in factors])
            columns, rows = columns[:0], rows[:0]
        return _Gradients(formed, columns, rows, owner, len(factors))

    def products(self, columns: Tensor, rows: Tensor) -> Tensor:
        """With ``rows_t columns_t^T`` of each position of another text, [T, I] and [T, O]: [Q, T] float32."""
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
    # A sum of squares that may come out a little below 0.
    return float(((rows @ rows.T) * (columns @ columns.T)).double().sum().clamp(min=0).sqrt())


def lengths_of(factors: Factors) -> Tensor:
    """`length_of` each target's: [targets] float64."""
    return torch.tensor(
        [length_of(columns, rows) for columns, rows in factors], dtype=torch.float64, device="cpu"
    )


class ExactQueries:
    """The exact gradients of some queries, to compare those of other texts with.

    lengths: [Q, targets] float64.
    """

    def __init__(self, factors: Iterable[Factors]) -> None:
        """factors: of each query."""
        by_target: list[Factors] = []
        lengths = []
        for parts in factors:
            by_target = by_target or [[] for _ in parts]
            for kept, pair in zip(by_target, parts, strict=True):
                kept.append(pair)
            lengths.append(lengths_of(parts))
        self._gradients = [_Gradients.of(kept) for kept in by_target]
        self.lengths = torch.stack(lengths)

    def products(self, target: int, columns: Tensor, rows: Tensor) -> Tensor:
        """[Q, T] with each position of another text, by its factors [T, I] and [T, O] there."""
        return self._gradients[target].products(columns, rows)

    def compare(self, target: int, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines [Q, B], lengths [B]), float32, with the gradients of other texts, by factors [B, T, I] and
        [B, T, O]."""
        pairs = list(zip(columns, rows, strict=True))
        length = torch.tensor([length_of(*pair) for pair in pairs], dtype=torch.float64, device="cpu")
        products = torch.stack([self.products(target, *pair).double().sum(1).cpu() for pair in pairs], 1)
        both = self.lengths[:, target, None] * length
        return torch.where(both > 0, products / both, 0.0).float(), length.float()


def factors_of(source: GradientSource, text: Encoded, point: int) -> Factors:
    """(columns [T, I], rows [T, O]) of each target, for one text, where the model stands."""
    return [(c[0], r[0]) for c, r in source.sketcher.factors(_batch(source, text), point)]


def query_bytes(source: GradientSource, query: Encoded) -> int:
    """Of a query's exact gradient at one point."""
    t = len(query.ids)
    sizes = [(target.shape[0], target.shape[1]) for target in source.targets if len(target.shape) == 2]
    return sum(4 * min(o * i, t * (o + i)) for o, i in sizes)


def chunks(source: GradientSource, queries: Sequence[Encoded]) -> Iterator[slice]:
    """Queries whose exact gradients fit into memory together, at least one at a time."""
    begun, held = 0, 0
    for n, query in enumerate(queries):
        size = query_bytes(source, query)
        if n > begun and held + size > _BYTES:
            yield slice(begun, n)
            begun, held = n, 0
        held += size
    yield slice(begun, len(queries))


def exact(
    source: GradientSource,
    queries: Sequence[Encoded],
    weights: Sequence[float],
    owners: Sequence[int],
    texts: Sequence[Encoded],
    normalize: str,
    on_text: OnText = lambda _: None,
) -> list[Tensor]:
    """What each position of each text brings to its exact scores by `dot`: [Q, T] float64 of each text.

    queries: with weights their losses are multiplied by; owners: the query whose lengths each is measured by,
    itself or the one that it is a part of. on_text: called with how many passes over texts are done. Raises
    UserError where a parameter that counts is not the weight of a linear layer.
    """
    layers = len(source.targets)
    blocks = layers * len(source.points)
    sums = [torch.zeros(len(queries), len(text.ids), dtype=torch.float64, device="cpu") for text in texts]
    own, theirs = (
        torch.zeros(len(queries), blocks, device="cpu").double(),
        torch.zeros(len(texts), blocks, device="cpu").double(),
    )
    done = 0
    try:
        for number in range(len(source.points)):
            blocks_here = slice(number * layers, (number + 1) * layers)
            with source.at(number):
                for n, query in enumerate(queries):
                    if owners[n] == n:
                        own[n, blocks_here] = lengths_of(factors_of(source, query, number))
                for chosen in chunks(source, queries):
                    held = ExactQueries(factors_of(source, query, number) for query in queries[chosen])
                    owned = own[list(owners[chosen]), blocks_here]
                    for n, text in enumerate(texts):
                        factors = factors_of(source, text, number)
                        theirs[n, blocks_here] = lengths_of(factors)
                        scale = torch.ones_like(owned)
                        if normalize == "layer":
                            scale = owned * theirs[n, blocks_here] * blocks
                            scale = torch.where(scale > 0, 1 / scale, 0.0)
                        for layer, (columns, rows) in enumerate(factors):
                            product = held.products(layer, columns, rows).double().cpu()
                            sums[n][chosen] += product * scale[:, layer, None]
                        done += 1
                        on_text(done)
    except TypeError as error:
        raise _wrong(error) from None
    scale = torch.tensor(list(weights), dtype=torch.float64, device="cpu")
    if normalize == "cosine":
        scale = scale / own[list(owners)].norm(dim=1).clamp(min=1e-300)
    for n in range(len(texts)):
        length = theirs[n].norm().clamp(min=1e-300) if normalize == "cosine" else 1.0
        sums[n] *= (scale / length)[:, None]
    return sums
