"""Follows tokens through the functions of a forward pass: which token each row of a tensor belongs to.

Routed experts receive the tokens of a batch gathered, sorted and repeated. To separate the gradients of the
examples, each tensor of hidden states carries the token numbers of its rows: an int64 tensor with as many
axes, of size 1 along feature axes, with ``b * T + t`` for token t of example b. When the tensor is indexed,
permuted or reshaped, so are the numbers. They are lost at a function that is not known to keep rows separate,
and assigned again when a module is called with hidden states [B, T, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_NUMBERS = "_rapidin_tokens"  # the attribute of a tensor with (the pass it belongs to, the numbers)

Call = tuple[tuple[Any, ...], Mapping[str, Any]]

ELEMENTWISE = frozenset(
    [
        "add",
        "iadd",
        "radd",
        "sub",
        "isub",
        "rsub",
        "mul",
        "imul",
        "rmul",
        "div",
        "idiv",
        "rdiv",
        "truediv",
        "itruediv",
        "rtruediv",
        "true_divide",
        "neg",
        "pow",
        "ipow",
        "rpow",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "abs",
        "sign",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "silu",
        "gelu",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "mish",
        "softplus",
        "softsign",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "logsigmoid",
        "log_sigmoid",
        "tanhshrink",
        "softshrink",
        "hardshrink",
        "threshold",
        "erf",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "minimum",
        "maximum",
        "where",
        "masked_fill",
        "lerp",
        "addcmul",
        "addcdiv",
        "nan_to_num",
        "dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "to",
        "type",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "contiguous",
        "clone",
        "detach",
        "multiply",
        "divide",
        "subtract",
        "round",
        "floor",
        "ceil",
    ]
)
# Functions along an axis, and the place of the axis among their arguments (None: by keyword alone).
_ALONG: dict[str, int] = {
    name: place
    for place, names in {
        1: "softmax log_softmax sum mean amax amin cumsum cumprod argmax argmin logsumexp max min glu sort "
        "argsort prod any all var std nansum softmin",
        2: "topk norm normalize linalg_vector_norm vector_norm",
    }.items()
    for name in names.split()
}
_LAST = frozenset(("glu", "sort", "argsort", "topk"))  # go along the last axis if none is named
_NORMS = frozenset(("layer_norm", "rms_norm"))
PRODUCTS = frozenset(
    ("linear", "matmul", "rmatmul", "imatmul", "mm", "bmm", "grouped_mm", "grouped_mm_fallback")
)
_SUMMED_PRODUCTS = frozenset(("addmm", "baddbmm"))
# Functions that read elements by their place alone, so that they may be applied to the numbers.
_PLACES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "expand",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "select",
        "narrow",
        "t",
        "T",
        "mT",
        "flip",
        "getitem",
        "view_as",
        "reshape_as",
        "expand_as",
    ]
)
_OVERWRITTEN = frozenset(
    [
        "setitem",
        "copy",
        "index_copy",
        "index_put",
        "scatter",
        "index_fill",
        "masked_scatter",
        "fill",
        "zero",
        "put",
    ]
)


@cache
def name_of(func: Callable[..., Any]) -> str:
    """A function's name, the same for all of its forms: 'add' for torch.add, Tensor.add_ and ``+``."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name if name in ("T", "mT") else "__get__"
    return name.strip("_")


class TokenNumbers:
    """The numbers of the tokens of one batch, [rows, length] of them."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.rows, self.length = rows, length
        self._all = torch.arange(rows * length, device=device).view(rows, length)

    def begin(self, x: Any) -> None:
        """Number the rows of hidden states [B, T, ...] that have no numbers."""
        if self.is_batch(x) and self.of(x) is None:
            self._set(x, self._all.to(x.device)[(...,) + (None,) * (x.ndim - 2)])

    def is_batch(self, x: Any) -> bool:
        """Whether x has the shape of the batch's hidden states."""
        return (
            isinstance(x, Tensor)
            and x.ndim > 2
            and x.shape[0] == self.rows
            and x.shape[1] == self.length
            and x.is_floating_point()
        )

    def of(self, x: Tensor) -> Tensor | None:
        """The numbers of x's rows; None if they are not known."""
        known = getattr(x, _NUMBERS, None)
        return known[1] if known is not None and known[0] is self else None

    def of_rows(self, x: Tensor) -> Tensor | None:
        """The number of each row of x [..., F], flattened: [N] int64; None if it is not known."""
        numbers = self.of(x)
        if numbers is None:
            if not self.is_batch(x):
                return None
            numbers = self._all.to(x.device)[(...,) + (None,) * (x.ndim - 2)]
        if numbers.shape[-1] != 1:
            return None
        return numbers[..., 0].expand(x.shape[:-1]).reshape(-1)

    def _set(self, x: Tensor, numbers: Tensor) -> None:
        if numbers.ndim == x.ndim and all(
            n in (1, size) for n, size in zip(numbers.shape, x.shape, strict=True)
        ):
            setattr(x, _NUMBERS, (self, numbers))

    def follow(self, name: str, call: Call, out: Any) -> None:
        """Give the results of a function the numbers that follow from those of its arguments."""
        args, kwargs = call
        if name in _OVERWRITTEN and args and isinstance(args[0], Tensor):
            if self.of(args[0]) is not None:
                delattr(args[0], _NUMBERS)
            return
        rule = _rule(name)
        if rule is None:
            return
        if name in ("reshape", "view", "flatten"):
            self.begin(args[0])
        rule(self, name, args, kwargs, out)

    # --------------------------------------------------------------------------------------- rules

    def _elementwise(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        best: Tensor | None = None
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and (numbers := self.of(x)) is not None:
                aligned = numbers[(None,) * (out.ndim - numbers.ndim)]
                if best is None or aligned.numel() > best.numel():
                    best = aligned
        if best is not None:
            self._set(out, best)

    def _along(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        x, numbers = self._first(args, kwargs)
        if numbers is None:
            return
        place = _ALONG[name]
        axis = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
        if axis is None:
            if name == "normalize":
                axis = 1
            elif name in _LAST:
                axis = -1
        axes = [axis] if isinstance(axis, int) and not isinstance(axis, bool) else axis
        if not isinstance(axes, (list, tuple)):
            return
        axes = sorted({a % x.ndim for a in axes})
        if any(numbers.shape[a] != 1 for a in axes):
            return
        removed = numbers
        for a in reversed(axes):
            removed = removed.squeeze(a)
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor):
                self._set(each, numbers if each.ndim == x.ndim else removed)

    def _norm(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        _, numbers = self._first(args, kwargs)
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        last = len(shape) if isinstance(shape, (list, tuple, torch.Size)) else 1
        if numbers is not None and all(n == 1 for n in numbers.shape[numbers.ndim - last :]):
            self._set(out, numbers)

    def _product(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if name in _SUMMED_PRODUCTS:
            args = args[1:]
        left = kwargs.get("input", args[0] if args else None)
        right = kwargs.get(
            "weight", kwargs.get("other", kwargs.get("mat2", args[1] if len(args) > 1 else None))
        )
        if name == "rmatmul":
            left, right = right, left
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return
        of_left, of_right = self.of(left), self.of(right)
        if of_left is not None and of_right is None and of_left.shape[-1] == 1 and left.ndim > 1:
            self._set(out, of_left[(None,) * (out.ndim - of_left.ndim)])
        elif of_right is not None and of_left is None and right.ndim > 1 and of_right.shape[-2] == 1:
            self._set(out, of_right[(None,) * (out.ndim - of_right.ndim)])

    def _places(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        x, numbers = self._first(args, kwargs)
        if numbers is None:
            return
        rest = args[1:] if args else ()
        if name == "getitem":
            moved = _indexed(x, numbers, rest[0])
        elif name in ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"):
            if rest and isinstance(rest[0], torch.dtype):
                return
            moved = _reshaped(x, numbers, out)
        else:
            wide = numbers.expand(x.shape)
            if name in ("T", "mT"):
                moved = getattr(wide, name)
            else:
                arguments = {key: value for key, value in kwargs.items() if key not in ("input", "self")}
                moved = getattr(torch.Tensor, name)(wide, *rest, **arguments)
        self._set_each(out, moved)

    def _select(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        x, numbers = self._first(args, kwargs)
        axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        if numbers is None or not isinstance(axis, int) or not isinstance(index, Tensor):
            return
        axis %= x.ndim
        if name == "index_select":
            self._set(out, numbers if numbers.shape[axis] == 1 else numbers.index_select(axis, index))
        elif numbers.shape[axis] != 1:  # gather: one index for all features, where it was expanded
            for a in range(x.ndim):
                if a != axis and numbers.shape[a] == 1 and index.stride(a) == 0:
                    index = index.narrow(a, 0, 1)
            wide = [x.shape[a] if a == axis else index.shape[a] for a in range(x.ndim)]
            if all(n in (1, w) for n, w in zip(numbers.shape, wide, strict=True)):
                self._set(out, numbers.expand(wide).gather(axis, index))
        elif all(n in (1, o) for n, o in zip(numbers.shape, out.shape, strict=True)):
            self._set(out, numbers)

    def _repeat(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        _, numbers = self._first(args, kwargs)
        if numbers is None:
            return
        if name in ("repeat", "tile"):
            counts = kwargs.get("repeats", kwargs.get("dims", args[1] if len(args) == 2 else args[1:]))
            counts = [counts] if isinstance(counts, int) else list(counts)
            counts = [1] * (out.ndim - len(counts)) + counts
            numbers = numbers[(None,) * (out.ndim - numbers.ndim)]
            # Along features, whose numbers have size 1, a repetition changes nothing.
            self._set(
                out, numbers.repeat([c if n > 1 else 1 for c, n in zip(counts, numbers.shape, strict=True)])
            )
            return
        axis = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if isinstance(axis, int):
            along = numbers.shape[axis] > 1
            counts = kwargs.get("repeats", args[1] if len(args) > 1 else None)
            self._set(out, numbers.repeat_interleave(counts, axis) if along else numbers)

    def _joined(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        parts = kwargs.get("tensors", args[0] if args else ())
        axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        if not isinstance(out, Tensor) or not isinstance(axis, int):
            return
        axis %= out.ndim
        numbers: list[Tensor] = []
        for part in parts:
            known = self.of(part)
            if known is None:
                return
            numbers.append(known.unsqueeze(axis) if name == "stack" else known)
        if all(n.shape[axis] == 1 and n is numbers[0] for n in numbers):
            self._set(out, numbers[0])
            return
        shape = [max(n.shape[a] for n in numbers) for a in range(out.ndim)]
        sizes = [1] * len(parts) if name == "stack" else [part.shape[axis] for part in parts]
        wide = [
            n.expand([size if a == axis else s for a, s in enumerate(shape)])
            for n, size in zip(numbers, sizes, strict=True)
        ]
        self._set(out, torch.cat(wide, axis))

    def _first(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        x = args[0] if args else kwargs.get("input", kwargs.get("self"))
        return x, (self.of(x) if isinstance(x, Tensor) else None)

    def _set_each(self, out: Any, moved: Any) -> None:
        if isinstance(out, Tensor):
            self._set(out, _narrowed(moved))
        elif isinstance(out, (list, tuple)):
            for each, numbers in zip(out, moved, strict=True):
                self._set_each(each, numbers)


def _narrowed(numbers: Tensor) -> Tensor:
    """Size 1 along the axes in which all numbers are the same because they were expanded."""
    for axis in range(numbers.ndim):
        if numbers.shape[axis] > 1 and numbers.stride(axis) == 0:
            numbers = numbers.narrow(axis, 0, 1)
    return numbers


def _reshaped(x: Tensor, numbers: Tensor, out: Tensor) -> Tensor:
    """The numbers of x with the shape of `out`, but of size 1 along last axes that stay as they are."""
    kept = 0
    while (
        kept < min(x.ndim, out.ndim)
        and x.shape[-1 - kept] == out.shape[-1 - kept]
        and numbers.shape[-1 - kept] == 1
    ):
        kept += 1
    features = (1,) * kept
    return numbers.expand(*x.shape[: x.ndim - kept], *features).reshape(
        *out.shape[: out.ndim - kept], *features
    )


def _indexed(x: Tensor, numbers: Tensor, index: Any) -> Tensor:
    """``numbers[index]`` as if they had x's shape, but without a copy for each feature."""
    items = list(index) if isinstance(index, tuple) else [index]
    spans = [
        0
        if i is None or isinstance(i, bool)
        else i.ndim
        if isinstance(i, Tensor) and i.dtype == torch.bool
        else 1
        for i in items
    ]
    copies = any(isinstance(i, (Tensor, list)) for i in items)
    if copies and not any(i is Ellipsis for i in items):
        used = sum(spans)
        wide = numbers.expand(*x.shape[:used], *numbers.shape[used:])
    else:
        wide = numbers.expand(x.shape)
    result: Tensor = wide[index]
    return result


_Rule = Callable[[TokenNumbers, str, Sequence[Any], Mapping[str, Any], Any], None]


@cache
def _rule(name: str) -> _Rule | None:
    """What a function does to the numbers; None if they are lost."""
    for names, rule in (
        (ELEMENTWISE, TokenNumbers._elementwise),
        (_PLACES, TokenNumbers._places),
        (_ALONG, TokenNumbers._along),
        (_NORMS, TokenNumbers._norm),
        (PRODUCTS | _SUMMED_PRODUCTS, TokenNumbers._product),
        (("index_select", "gather", "take_along_dim"), TokenNumbers._select),
        (("repeat", "tile", "repeat_interleave"), TokenNumbers._repeat),
        (("cat", "concat", "concatenate", "stack"), TokenNumbers._joined),
    ):
        if name in names:
            return rule
    return None
