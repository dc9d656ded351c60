"""Uses of tracked parameters: products with parts of them, and sums of weights with an adapter's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rapidin.gradients.rows import RowFactors
from rapidin.gradients.views import Span, WeightView

# Functions that do not use a tensor's values, or give no gradient.
PASSIVE = frozenset(
    [
        "__get__",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "data_ptr",
        "is_contiguous",
        "element_size",
        "len",
        "hash",
        "register_hook",
        "untyped_storage",
        "is_floating_point",
        "is_complex",
        "get_device",
        "has_names",
        "format",
        "repr",
        "detach",
        "requires_grad",
        "zeros_like",
        "ones_like",
        "empty_like",
        "rand_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "is_inference",
        "is_tensor",
        "isfinite",
        "isnan",
        "isinf",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "item",
        "tolist",
        "one_hot",
        "argmax",
        "argsort",
        "nonzero",
        "bincount",
        "histc",
    ]
)
COPIES = frozenset(["to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"])

Through = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of (rows, columns)


class UntrackedError(Exception):
    """Parameters are used in a way that is not recognized, so autograd has to compute their gradients."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(f"targets {list(numbers)}")
        self.numbers = list(numbers)


@dataclass(frozen=True)
class WeightSum:
    """``W + alpha left @ right``, the weight [E, O, I] that an adapter makes of W.

    base: the view of W, or None if W does not count; left, right: views [E, O, r] and [E, r, I] of the
    adapter's parameters, or None; values: both as tensors.
    """

    base: WeightView | None
    left: WeightView | None
    right: WeightView | None
    values: tuple[Tensor, Tensor]
    alpha: float = 1.0

    @property
    def numbers(self) -> list[int]:
        """The targets that take part."""
        return [v.n for v in (self.base, self.left, self.right) if v is not None]

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values[0].shape[1], self.values[1].shape[2]


@dataclass(frozen=True)
class SumView:
    """A view of a sum, as a view of its contiguous values."""

    sum: WeightSum
    view: WeightView


@dataclass
class WeightUse:
    """One product or sum with a part of a parameter.

    span: the part; experts: the number of each row's matrix [N], one for all, or None if the parameter is one
    matrix; tokens: the token of each row [N], None if unknown; inputs: [N, K], None for a bias; input_is_row:
    whether the parameter's rows are those of the inputs; flat: makes rows [N, M] of the outputs' gradient;
    through: changes (rows, columns); grad: [N, M], once it is there.
    """

    span: Span | None
    experts: Tensor | int | None
    tokens: Tensor | None
    inputs: Tensor | None
    input_is_row: bool
    flat: Callable[[Tensor], Tensor]
    through: Through | None = None
    grad: Tensor | None = None
    version: int = 0  # of the inputs when they were used

    def __post_init__(self) -> None:
        self.version = 0 if self.inputs is None else self.inputs._version

    @property
    def changed(self) -> bool:
        """Whether the inputs have been changed in place since they were used."""
        return self.inputs is not None and self.inputs._version != self.version

    def factors(self) -> RowFactors:
        """The factors of the use's gradient."""
        assert self.grad is not None
        if self.inputs is None:
            return RowFactors(None, self.grad, self.tokens, None)
        rows, columns = (self.inputs, self.grad) if self.input_is_row else (self.grad, self.inputs)
        if self.through is not None:
            rows, columns = self.through(rows, columns)
        if self.span is not None:
            rows, columns = self.span.whole_rows(rows), self.span.whole_columns(columns)
        experts = self.experts
        if isinstance(experts, int):
            experts = torch.full((len(rows),), experts, device=rows.device)
        return RowFactors(columns, rows, self.tokens, experts)


@dataclass
class TargetUses:
    """The uses of a target in a pass, and how many of them wait for their gradient."""

    uses: list[WeightUse] = field(default_factory=list)
    waiting: int = 0


@dataclass(frozen=True)
class Product:
    """``x @ w`` as rows: inputs [..., N, K] with the numbers of their tokens, and the axis of w (-1 or -2)
    that the outputs go along; flat: makes [..., N, M] of the output's gradient."""

    inputs: Tensor
    out_axis: int
    flat: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenRows:
    """Inputs of a product [N, K], and the token of each [N]."""

    inputs: Tensor
    tokens: Tensor | None


def made_sum(left: Tensor, of_left: Any, right: Tensor, of_right: Any) -> WeightSum | None:
    """``left @ right`` of two views."""
    if isinstance(of_left, SumView) or isinstance(of_right, SumView) or left.ndim != right.ndim:
        return None
    if left.ndim == 2:
        left, right = left[None], right[None]
    if left.ndim != 3:
        return None
    return WeightSum(None, stacked(of_left), stacked(of_right), (left.detach(), right.detach()))


def einsum_sum(args: Sequence[Any], views: dict[int, Any]) -> WeightSum | None:
    """peft's ``einsum("o r e, e r i -> e o i", B, A)``, or its transpose."""
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    of_b, of_a = views.get(id(args[1])), views.get(id(args[2]))
    if not isinstance(of_b, WeightView) or not isinstance(of_a, WeightView):
        return None
    b, a = args[1].permute(2, 0, 1), args[2]
    made = WeightSum(None, of_b.permuted(2, 0, 1), of_a, (b.detach(), a.detach()))
    form = args[0].replace(" ", "")
    if form == "ore,eri->eoi":
        return made
    if form == "ore,eri->eio":
        return WeightSum(None, of_a.permuted(0, 2, 1), of_b.permuted(2, 1, 0), (a.mT.detach(), b.mT.detach()))
    return None


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors among a function's arguments, also in lists."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (each for each in x if isinstance(each, Tensor))


def numbers_of(views: Iterable[WeightView | SumView]) -> list[int]:
    """The targets that views show parts of."""
    numbers: list[int] = []
    for view in views:
        numbers += view.sum.numbers if isinstance(view, SumView) else [view.n]
    return numbers


def stacked(view: WeightView | None) -> WeightView | None:
    """A view of one matrix as a stack of one."""
    if view is None or len(view.shape) == 3:
        return view
    return replace(view, shape=(1, *view.shape), strides=(0, *view.strides))


def is_list_of_numbers(index: Any) -> bool:
    return isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int64, torch.int32)


def is_whole(span: Span) -> bool:
    """Whether a span is all of its matrix."""
    o, i = span.shape
    return span.rows == slice(0, o, 1) and span.columns == slice(0, i, 1)


def first_of(tokens: Tensor | None, count: int) -> Tensor | None:
    return None if tokens is None else tokens[:count]
