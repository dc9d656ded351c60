"""Finds from the strides of a view which part of a parameter it shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A part of a matrix [O, I]: every so many rows from a first, and columns likewise."""

    shape: tuple[int, int]
    rows: slice
    columns: slice

    def whole_rows(self, x: Tensor) -> Tensor:
        """x [N, rows of the part] as [N, O], zero elsewhere."""
        return _spread(x, self.rows, self.shape[0])

    def whole_columns(self, x: Tensor) -> Tensor:
        """x [N, columns of the part] as [N, I], zero elsewhere."""
        return _spread(x, self.columns, self.shape[1])


@dataclass(frozen=True)
class Placed:
    """A part of one matrix of a stack. matrix: its number; first_is_row: whether the view's first axis goes
    along the matrix's rows, not along its columns."""

    matrix: int
    span: Span
    first_is_row: bool


@dataclass(frozen=True)
class WeightView:
    """A view of a contiguous parameter, or a copy of one.

    n: the number of the target; shape, strides, offset: of the view, in numbers of the flattened parameter;
    picked: for a copy of some items along the first axis, their places there, in units of its stride.
    """

    n: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    picked: Tensor | None = None

    @staticmethod
    def whole(n: int, x: Tensor) -> WeightView:
        """The view of all of a parameter."""
        return WeightView(n, tuple(x.shape), contiguous_strides(x.shape))

    def part(self, view: Tensor, of: Tensor) -> WeightView | None:
        """What a torch view of `of`, a tensor that shows this, shows; None if that has no strides."""
        if self.picked is not None or not of.is_contiguous():
            return None
        offset = view.storage_offset() - of.storage_offset()
        steps = contiguous_strides(of.shape)
        start = self.offset
        for size, step, stride in zip(of.shape, steps, self.strides, strict=True):
            start += (offset // step) % size * stride
        if self.strides == steps:
            return WeightView(self.n, tuple(view.shape), tuple(view.stride()), start)
        strides = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            axis = next((a for a, step in enumerate(steps) if stride and stride % step == 0), None)
            if stride == 0 or size == 1:
                strides.append(0)
            elif axis is None or (stride // steps[axis]) * size > of.shape[axis]:
                return None
            else:
                strides.append(stride // steps[axis] * self.strides[axis])
        return WeightView(self.n, tuple(view.shape), tuple(strides), start)

    def item(self, number: int) -> WeightView:
        """The view of one item along the first axis."""
        offset = self.offset + number * self.strides[0]
        return WeightView(self.n, self.shape[1:], self.strides[1:], offset)

    def permuted(self, *axes: int) -> WeightView:
        """The view with its axes in another order."""
        return replace(
            self, shape=tuple(self.shape[a] for a in axes), strides=tuple(self.strides[a] for a in axes)
        )

    def placed(self, matrix: tuple[int, int]) -> Placed | None:
        """Where the last two axes lie in a stack of matrices of shape (O, I); None if in no single span."""
        o, i = matrix
        number, rest = divmod(self.offset, o * i)
        row, column = divmod(rest, i)
        (first, second), (first_step, second_step) = self.shape[-2:], self.strides[-2:]
        for first_is_row in (True, False):
            sizes = (first, second) if first_is_row else (second, first)
            steps = (first_step, second_step) if first_is_row else (second_step, first_step)
            down, left = divmod(steps[0], i) if sizes[0] > 1 else (1, 0)
            right = steps[1] if sizes[1] > 1 else 1
            if left or not down or not right:
                continue
            rows = slice(row, row + (sizes[0] - 1) * down + 1, down)
            columns = slice(column, column + (sizes[1] - 1) * right + 1, right)
            if rows.stop <= o and columns.stop <= i:
                return Placed(number, Span(matrix, rows, columns), first_is_row)
        return None

    def matrices(self, matrix: tuple[int, int], device: torch.device) -> Tensor | None:
        """The number of the matrix of each item along the first axis [E] int64, relative to `placed`'s; None
        if an item is not a matrix of a stack of shape (O, I)."""
        step, rest = divmod(self.strides[0], prod(matrix))
        if rest:
            return None
        if self.picked is not None:
            return self.picked.to(device) * step
        return torch.arange(self.shape[0], device=device) * step

    def bias_rows(self, shape: tuple[int, ...], rows: torch.Size, device: torch.device) -> Tensor | None:
        """Which row of a parameter [E, O] is added to each of `rows` outputs, flattened: [N] int64; None if
        it is not one row each."""
        whole = len(shape) == 2 and self.shape[-1] == shape[-1] and self.strides[-1] == 1
        if not whole or self.offset % shape[1]:
            return None
        number = torch.full((1,) * len(rows), self.offset // shape[1], device=device)
        for axis, (size, stride) in enumerate(zip(self.shape[:-1], self.strides[:-1], strict=True)):
            step, rest = divmod(stride, shape[1])
            if rest:
                return None
            along = torch.arange(size, device=device) if self.picked is None or axis else self.picked
            number = number + (along * step).view(-1, *(1,) * (len(self.shape) - 2 - axis))
        return number.expand(rows).reshape(-1)


def contiguous_strides(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _spread(x: Tensor, places: slice, size: int) -> Tensor:
    if x.shape[1] == size and places.step == 1:
        return x
    whole = x.new_zeros(len(x), size)
    whole[:, places] = x
    return whole
