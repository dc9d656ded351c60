"""One forward pass for the rows of a batch that are all the same text.

The tokens of a text have losses of their own, each of which needs a backward pass, but one forward pass would
do for all. A batch of as many copies of the text as there are tokens gives a backward pass for each, whose
products are as large as in any batch. Inside `SharedRows` the products with weights, which are most of the
work, are computed for the first copy alone in the forward pass, and copied: about a third of all operations
is saved. Everything else, such as attention, runs for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rapidin import ops

# How far the inputs of a layer may differ between rows by rounding, by the length of a token's: so many times
# the number format's epsilon, and in float32 what the layers before may make of it.
_MOST_ROUNDING, _LEAST_ROUNDING = 4, 1e-4


class _FirstRow(torch.autograd.Function):
    """``F.linear`` of rows [B, T, I] that are all the same, in which only the inputs need a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _of_first(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return ops.matmul(grads[0], weight), None, None


def _of_first(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A copy for each row, since the model may change its hidden states in place.
    return ops.linear(x[:1], weight, bias).expand(len(x), -1, -1).contiguous()


class SharedRows(TorchFunctionMode):
    """Inside the block, linear layers compute one row of a batch whose rows are the same.

    rows: number of them. A layer is left alone unless its inputs [rows, T, I] and its weight are plain
    tensors of one number format, and the weight needs no gradient.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._differ: list[Tensor] = []

    @property
    def differ(self) -> bool:
        """Whether the inputs of some layer were not the same in all rows, so that what was computed is
        wrong. A GPU is waited for."""
        if not self._differ:
            return False
        device = self._differ[0].device
        return bool(torch.stack([each.to(device) for each in self._differ]).any())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and self._applies(*args):
            x, weight, bias = (*args, None)[:3]
            self._compare(x.detach())
            function: Any = _FirstRow.apply if x.requires_grad and torch.is_grad_enabled() else _of_first
            return function(x, weight, bias)
        return func(*args, **(kwargs or {}))

    def _applies(self, x: Any, weight: Any, bias: Any = None) -> bool:
        plain = all(type(p) in (Tensor, nn.Parameter) for p in (x, weight, *([] if bias is None else [bias])))
        return (
            plain
            and x.ndim == 3
            and x.shape[0] == self._rows > 1
            and x.numel() > 0
            and x.dtype == weight.dtype
            and x.is_floating_point()
            and not torch.is_autocast_enabled(x.device.type)
            and not any(p.requires_grad for p in (weight, *([] if bias is None else [bias])))
        )

    def _compare(self, x: Tensor) -> None:
        first = x[:1]
        within = max(_MOST_ROUNDING * torch.finfo(x.dtype).eps, _LEAST_ROUNDING)
        apart = (x.float() - first.float()).norm(dim=2) > within * first.float().norm(dim=2)
        self._differ.append(apart.any() | (x.isfinite() != first.isfinite()).any())


def shares_forward(model: nn.Module, sharded: bool) -> bool:
    """Whether copies of a text may share the forward pass of a model: not of a compiled one, whose functions
    are not seen, nor of one that is spread over processes."""
    return not (sharded or ops.is_compiled(model))
