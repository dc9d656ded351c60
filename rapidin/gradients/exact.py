"""Exact gradients of single examples, and their inner products.

A gradient is kept as the factors of its rows, ``sum_n rows_n columns_n^T``, and formed where that is smaller
or where it has no such factors. With the factors h_s, b_s of another gradient the inner product is ``sum_n
sum_s <rows_n, h_s> <columns_n, b_s>``, over pairs of rows of the same matrix if the parameter is a stack of
matrices. An embedding is treated as a stack with a matrix of one row for each token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rapidin.gradients.calls import Call
from rapidin.gradients.passes import GradientPass, SketchTargets
from rapidin.gradients.rows import RowFactors, RowGroup
from rapidin.gradients.scale import Factors, Scale
from rapidin.gradients.squares import as_factors
from rapidin.tasks.task import AnyBatch


@dataclass(frozen=True, slots=True)
class ExactGradient:
    """The gradient of a parameter for one example.

    shape: (E, O, I), E matrices, of which a parameter that is no stack has one; formed: the gradient in this
    shape, or None; factors: else the factors of its rows, whose tokens are positions of the example. All are
    float32.
    """

    shape: tuple[int, int, int]
    formed: Tensor | None
    factors: RowFactors | None

    @property
    def elements(self) -> int:
        """How many numbers it is kept as."""
        if self.formed is not None:
            return self.formed.numel()
        columns, rows = _both(self.factors)
        return columns.numel() + rows.numel()

    def as_formed(self) -> Tensor:
        """[E, O, I] float32."""
        if self.formed is not None:
            return self.formed
        columns, rows = _both(self.factors)
        if self.shape[0] == 1:
            return (rows.mT @ columns)[None]
        experts = _experts(self.factors)
        formed = torch.zeros(self.shape, device=rows.device)
        if self.shape[1] == 1:
            formed[:, 0].index_add_(0, experts, rows * columns)
            return formed
        for expert, own in _by_matrix(experts):
            formed[expert] = rows[own].mT @ columns[own]
        return formed

    def smallest(self) -> ExactGradient:
        """The same, formed if that takes fewer numbers."""
        e, o, i = self.shape
        return self if e * o * i >= self.elements else ExactGradient(self.shape, self.as_formed(), None)

    def length(self) -> float:
        """Its norm."""
        e, o, i = self.shape
        columns, rows = (None, None) if self.formed is not None else _both(self.factors)
        if columns is None or rows is None or e * o * i < len(rows) * (o + i):
            return float(self.as_formed().double().norm())
        if e == 1:
            return _length(columns, rows)
        parts = [_length(columns[own], rows[own]) for _, own in _by_matrix(_experts(self.factors))]
        return float(torch.tensor(parts, dtype=torch.float64, device="cpu").norm())


def _length(columns: Tensor, rows: Tensor) -> float:
    # Rounding may make this sum of squares slightly negative.
    return float(((rows @ rows.mT) * (columns @ columns.mT)).double().sum().clamp(min=0).sqrt())


def _both(factors: RowFactors | None) -> tuple[Tensor, Tensor]:
    """(columns, rows)."""
    assert factors is not None
    assert factors.columns is not None
    return factors.columns, factors.rows


def _experts(factors: RowFactors | None) -> Tensor:
    assert factors is not None
    assert factors.experts is not None
    return factors.experts


def _by_matrix(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(matrix, the numbers of its rows) of each matrix that has rows, in their order."""
    order = torch.sort(experts, stable=True).indices
    found, counts = torch.unique(experts, return_counts=True)
    yield from zip(found.tolist(), torch.split(order, counts.tolist()), strict=True)


# ------------------------------------------------------------------------------------- inner products


@dataclass(frozen=True)
class _Queries:
    """The gradients of some queries for one parameter.

    formed: the gradients [Q, E, O, I], or None; factors: else the factors of all queries, concatenated, with
    owner [S], the query of each row.
    """

    count: int
    formed: Tensor | None
    factors: RowFactors | None
    owner: Tensor | None

    @staticmethod
    def of(gradients: Sequence[ExactGradient]) -> _Queries:
        e, o, i = gradients[0].shape
        kept = [gradient.factors for gradient in gradients if gradient.factors is not None]
        elements = sum(gradient.elements for gradient in gradients)
        if len(kept) < len(gradients) or len(gradients) * e * o * i < elements:
            return _Queries(len(gradients), torch.stack([g.as_formed() for g in gradients]), None, None)
        device = kept[0].rows.device
        sizes = torch.tensor([len(factors.rows) for factors in kept], device=device)
        owner = torch.repeat_interleave(torch.arange(len(kept), device=device), sizes)
        return _Queries(len(kept), None, RowFactors.joined(kept), owner)

    def products(self, gradient: ExactGradient) -> Tensor:
        """Inner products with each row of a gradient that is not formed, [Q, N], else with all of it, [Q, 1];
        float32."""
        if self.formed is not None:
            if gradient.factors is None:
                return (self.formed.flatten(1) @ gradient.as_formed().flatten())[:, None]
            return _with_formed(gradient.factors, self.formed)
        assert self.owner is not None
        if gradient.factors is None:
            by_row = _with_formed(self.factors, gradient.as_formed()[None]).mT
        else:
            by_row = _pairs(self.factors, gradient.factors)
        return by_row.new_zeros(self.count, by_row.shape[1]).index_add_(0, self.owner, by_row)


def _with_formed(factors: RowFactors | None, formed: Tensor) -> Tensor:
    """Inner products [Q, N] of each row with formed gradients [Q, E, O, I]."""
    columns, rows = _both(factors)
    if formed.shape[1] == 1:
        return torch.einsum("no,qoi,ni->qn", rows, formed[:, 0], columns)
    experts = _experts(factors)
    if formed.shape[2] == 1:
        return torch.einsum("qni,ni->qn", formed[:, experts, 0], columns) * rows[:, 0]
    products = rows.new_zeros(len(formed), len(rows))
    for expert, own in _by_matrix(experts):
        products[:, own] = torch.einsum("no,qoi,ni->qn", rows[own], formed[:, expert], columns[own])
    return products


def _pairs(first: RowFactors | None, second: RowFactors) -> Tensor:
    """Inner products [S, N] of each row of the first with each of the second."""
    (columns, rows), (other_columns, other_rows) = _both(first), _both(second)
    if second.experts is None:
        return (rows @ other_rows.mT) * (columns @ other_columns.mT)
    products = rows.new_zeros(len(rows), len(other_rows))
    own_rows = dict(_by_matrix(_experts(first)))
    for expert, others in _by_matrix(second.experts):
        if expert in own_rows:
            own = own_rows[expert]
            products[own[:, None], others] = (rows[own] @ other_rows[others].mT) * (
                columns[own] @ other_columns[others].mT
            )
    return products


def lengths_of(gradients: Sequence[ExactGradient]) -> Tensor:
    """The norm of each gradient: [parameters] float64."""
    return torch.tensor([g.length() for g in gradients], dtype=torch.float64, device="cpu")


class ExactQueries:
    """The exact gradients of some queries, to compare with those of other examples.

    lengths: [Q, parameters] float64.
    """

    def __init__(self, gradients: Iterable[Sequence[ExactGradient]]) -> None:
        """gradients: those of each query, of each parameter."""
        by_parameter: list[list[ExactGradient]] = []
        lengths = []
        for of_query in gradients:
            by_parameter = by_parameter or [[] for _ in of_query]
            for known, gradient in zip(by_parameter, of_query, strict=True):
                known.append(gradient.smallest())
            lengths.append(lengths_of(of_query))
        self._queries = [_Queries.of(known) for known in by_parameter]
        self.lengths = torch.stack(lengths)

    def products(self, parameter: int, gradient: ExactGradient) -> Tensor:
        """Inner products [Q] float64, on the CPU, with the gradient of another example."""
        return self._queries[parameter].products(gradient).sum(1, dtype=torch.float64).cpu()

    def position_products(self, parameter: int, gradient: ExactGradient, length: int) -> Tensor:
        """Those with each position of an example of so many tokens, [Q, length] float64 on the CPU; the
        gradient was taken by position."""
        assert gradient.factors is not None
        assert gradient.factors.tokens is not None
        by_row = self._queries[parameter].products(gradient).double()
        products = by_row.new_zeros(len(by_row), length)
        return products.index_add_(1, gradient.factors.tokens, by_row).cpu()


# --------------------------------------------------------------------------------------------- the pass


class ExactPass(GradientPass):
    """Keeps the gradients of a batch of one example as they are, preconditioned.

    by_position: whether each row has to belong to a position of the text; TypeError is raised for a gradient
    that does not come position by position.
    """

    def __init__(
        self,
        sketched: SketchTargets,
        batch: AnyBatch,
        scales: Sequence[Scale] | None,
        *,
        by_position: bool = False,
    ) -> None:
        super().__init__(sketched, batch, scales)
        if self.rows != 1:
            raise ValueError(f"the batch must have one example, got {self.rows}")
        self._by_position = by_position
        self._factors: dict[int, list[RowFactors]] = {}
        self._formed: dict[int, Tensor] = {}

    def gradients(self) -> list[ExactGradient]:
        """The gradient of each target, without rows if the example does not reach it."""
        return [self._gradient(n) for n in range(len(self.targets))]

    def _gradient(self, n: int) -> ExactGradient:
        o, i = self.targets[n].matrix
        stack = self.targets[n].stack or 1
        if self._embedded(n):
            stack, o = o, 1
        shape = (stack, o, i)
        parts, formed = self._factors.get(n), self._formed.get(n)
        factors = RowFactors.joined(parts) if parts else None
        if formed is None:
            return ExactGradient(shape, None, factors or self._nothing(*shape))
        whole = ExactGradient(shape, formed.view(shape), None)
        if factors is None:
            return whole
        return ExactGradient(shape, whole.as_formed() + ExactGradient(shape, None, factors).as_formed(), None)

    def _nothing(self, stack: int, o: int, i: int) -> RowFactors:
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        columns, rows = (torch.zeros(0, size, device=self.device) for size in (i, o))
        return RowFactors(columns, rows, empty, empty if stack > 1 else None)

    def _embedded(self, n: int) -> bool:
        """Whether a target is the weight of embeddings and of nothing else."""
        return {use.kind for use in self.targets[n].uses} == {"embedding"}

    # ---------------------------------------------------------------------------------- what arrives

    def add_factors(self, n: int, factors: Factors) -> None:
        columns, rows = factors.applied()
        self._add(n, columns[0], rows[0], self._positions(n, rows.shape[1]))

    def add_rows(self, n: int, factors: RowFactors) -> None:
        columns, tokens = factors.columns, factors.tokens
        if columns is None:
            columns = factors.rows.new_ones(len(factors.rows), 1)
        if tokens is None and self._by_position:
            raise self.no_positions(n)
        columns, rows = self.scaled(n, columns[None], factors.rows[None]).applied()
        self._add(n, columns[0], rows[0], tokens, factors.experts)

    def add_group(self, n: int, factors: Factors, group: RowGroup) -> None:
        raise AssertionError("rows are not put together by expert")

    def add_embedding(self, n: int, ids: Tensor, grad: Tensor) -> None:
        positions, ids = self._positions(n, ids.shape[1]), ids.to(grad.device)
        if self._embedded(n):
            self._add(n, grad[0], grad.new_ones(len(grad[0]), 1), positions, ids[0])
        else:
            columns, rows = as_factors(ids, grad, self.targets[n].shape[0])
            self._add(n, columns[0], rows[0], positions)

    def add_bias(self, n: int, grad: Tensor) -> None:
        grad = grad.float()
        self.add_factors(n, self.scaled(n, grad.new_ones(1, grad.shape[1], 1), grad))

    def add_module(self, module: nn.Module, numbers: Sequence[int], call: Call, grad: Tensor) -> None:
        if not self._by_position:
            super().add_module(module, numbers, call, grad)
            return
        for n, grads in self.module_positions(module, numbers, call, grad):
            rows = self.scales[n].formed(grads) if self.scales else grads
            ones = rows.new_ones(len(rows), 1)
            self._add(n, ones, rows[:, :, 0], self._positions(n, len(rows)))

    def add_formed(self, n: int, grad: Tensor) -> None:
        if self._by_position:
            raise self.no_positions(n)
        self._formed[n] = self._formed[n] + grad.float() if n in self._formed else grad.float()

    def _add(
        self, n: int, columns: Tensor, rows: Tensor, tokens: Tensor | None, experts: Tensor | None = None
    ) -> None:
        factors = RowFactors(columns.float(), rows.float(), tokens, experts)
        self._factors.setdefault(n, []).append(factors)

    def _positions(self, n: int, count: int) -> Tensor | None:
        """The positions of rows that may be all positions in their order."""
        if count == self.length:
            return torch.arange(count, device=self.device)
        if self._by_position:  # some of the tokens, say
            raise self.no_positions(n)
        return None
