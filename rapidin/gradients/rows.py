"""Factors of gradients whose rows are in any order, as for routed experts, and their grouping by example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEP, _FEW, _COARSE = 16, 128, 64  # rows of a group are padded to multiples of 16, of 64 if they are many


@dataclass(frozen=True, slots=True)
class RowFactors:
    """The factors of a parameter's gradient, ``sum_n rows_n columns_n^T`` over rows n of any order.

    columns: [N, I], None for a bias; rows: [N, O]; tokens: [N] int64, the token ``b * T + t`` that each row
    belongs to, None if unknown, in a batch of one; experts: [N] int64, which matrix of a stack each row is a
    part of, None if the parameter is one matrix.
    """

    columns: Tensor | None
    rows: Tensor
    tokens: Tensor | None
    experts: Tensor | None

    @staticmethod
    def joined(parts: Sequence[RowFactors]) -> RowFactors:
        """All rows of some factors of one parameter."""
        if len(parts) == 1:
            return parts[0]
        every: list[Tensor | None] = []
        for name in ("columns", "rows", "tokens", "experts"):
            found = [getattr(part, name) for part in parts]
            every.append(None if any(x is None for x in found) else torch.cat(found))
        columns, rows, tokens, experts = every
        assert rows is not None
        return RowFactors(columns, rows, tokens, experts)

    def examples(self, length: int) -> Tensor:
        """The example of each row, [N] int64, for examples padded to `length` tokens."""
        if self.tokens is None:
            return torch.zeros(len(self.rows), dtype=torch.int64, device=self.rows.device)
        return self.tokens // length


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The rows of some pairs of an example and an expert. examples, experts: of each pair, [P] int64;
    columns: [P, L, I], rows: [P, L, O], zero where a pair has fewer rows."""

    examples: Tensor
    experts: Tensor
    columns: Tensor
    rows: Tensor


def by_example(factors: RowFactors, examples: int, length: int) -> tuple[Tensor | None, Tensor]:
    """(columns [B, L, I], rows [B, L, O]) with the rows of each example together, zero where it has fewer."""
    columns, rows = factors.columns, factors.rows
    if examples == 1:
        return None if columns is None else columns[None], rows[None]
    owners = factors.examples(length)
    order, counts = _sorted(owners, examples)
    most = max(1, int(counts.max()))
    ends = counts.cumsum(0)
    place = torch.arange(len(rows), device=rows.device) - (ends - counts)[owners[order]]
    at = owners[order] * most + place

    def padded(x: Tensor) -> Tensor:
        whole = x.new_zeros(examples * most, x.shape[1])
        whole[at] = x[order]
        return whole.view(examples, most, x.shape[1])

    return None if columns is None else padded(columns), padded(rows)


def by_expert(factors: RowFactors, experts: int, length: int) -> Iterator[RowGroup]:
    """The rows by pair of example and expert; pairs with about as many rows come together."""
    assert factors.experts is not None
    assert factors.columns is not None
    columns, rows = factors.columns, factors.rows
    if not len(rows):
        return
    device = rows.device
    keys = factors.examples(length) * experts + factors.experts
    order, counts = _sorted(keys, int(keys.max()) + 1)
    starts = (counts.cumsum(0) - counts).cpu()
    counts = counts.cpu()
    sizes = torch.where(counts <= _FEW, _rounded(counts, _STEP), _rounded(counts, _COARSE))
    for size in torch.unique(sizes).tolist():
        if not size:
            continue
        chosen = (sizes == size).nonzero()[:, 0]
        first, count = starts[chosen].to(device)[:, None], counts[chosen].to(device)[:, None]
        place = torch.arange(size, device=device)
        # A pair's own last row stands where it has no more, with a gradient of zero.
        at = order[first + torch.minimum(place, count - 1)]
        pair = chosen.to(device)
        yield RowGroup(
            pair // experts,
            pair % experts,
            columns[at],
            rows[at].masked_fill_((place >= count)[..., None], 0.0),
        )


def _sorted(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the order that sorts keys, how often each occurs [count])."""
    return torch.sort(keys, stable=True).indices, torch.bincount(keys, minlength=count)


def _rounded(x: Tensor, step: int) -> Tensor:
    return (x + step - 1) // step * step
