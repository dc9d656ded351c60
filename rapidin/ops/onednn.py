"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch has for them.

torch multiplies float32 matrices with MKL, which takes its AVX2 code on processors of other makers than
Intel's. oneDNN, which torch has too, takes AVX-512 wherever there is any. On a server's Zen 5, whose AVX-512
units are as wide as its registers, that is more than twice as fast: bench/bench_matmul.py compares the two.
Of other families of processors nothing was measured, and all products there are torch's own.

RAPIDIN_ONEDNN=on takes oneDNN on any processor, RAPIDIN_ONEDNN=off on none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rapidin.errors import UserError
from rapidin.ops import _cpu

_ZEN_5 = ("AuthenticAMD", 0x1A)  # vendor and family
_LEAST = 1 << 21  # multiply-adds of a product that is worth it: a call of oneDNN takes some 10 us more
_LEAST_ROWS = 4  # with fewer, reading the matrix is most of the work
# oneDNN keeps what it makes for each shape of a product, about a megabyte, of the last 1,024 of them. Each
# batch has a number of rows of its own, and fewer shapes than this.
_KEPT_SHAPES = "32"
_CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # of torch and of oneDNN itself


@cache
def onednn_is_faster() -> bool:
    """Whether large products are oneDNN's on this machine. Raises UserError if RAPIDIN_ONEDNN has another
    value than on, off and auto."""
    wanted = os.environ.get("RAPIDIN_ONEDNN", "auto")
    if wanted not in ("on", "off", "auto"):
        raise UserError(f"RAPIDIN_ONEDNN must be on, off or auto, got '{wanted}'")
    libraries: Any = torch.backends
    if wanted == "off" or not libraries.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if wanted == "auto":
        known = is_faster_on(*_cpu.processor(), _cpu.supported_sets())
        if not known or not libraries.mkl.is_available():
            return False
    for name in _CAPACITIES:  # both are read at the first product
        os.environ.setdefault(name, _KEPT_SHAPES)
    return True


def is_faster_on(vendor: str, family: int, instruction_sets: Sequence[str]) -> bool:
    """Whether oneDNN is known to be faster than MKL on a processor of this vendor and family."""
    return (vendor, family) == _ZEN_5 and "avx512" in instruction_sets


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; x: [..., n], weight: [m, n], bias: [m] -> [..., m].

    By oneDNN where that is faster and no graph is needed. It is as exact as torch's own product, but sums in
    another order.
    """
    needs_graph = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (x, weight, bias)
    )
    if needs_graph or not is_worth_it(x, weight, bias):
        return F.linear(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as `linear` multiplies; x: [..., n], y: [n, m] -> [..., m]."""
    return linear(x, y.T)


def addmm(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """total + x @ y as `linear` multiplies; total: [..., m], x: [..., n], y: [n, m]."""
    if is_worth_it(x, y.T):
        return matmul(x, y).add_(total)
    return torch.addmm(total.flatten(0, -2), x.flatten(0, -2), y).view_as(total)


def faster_linear(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside the block the large linear layers of a float32 model on a CPU are multiplied as by `linear`, and
    so are their gradients, in a backward pass after it. Those of a compiled model are left alone."""
    known = onednn_is_faster() and any(
        each.dtype == torch.float32 and each.device.type == "cpu" for each in model.parameters()
    )
    return _FasterLinear() if known and not is_compiled(model) else nullcontext()


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to a module of the model, so that its functions are not seen."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def is_worth_it(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` multiplies these by oneDNN, if no graph is needed."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.ndim > 1
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and x.numel() * weight.shape[0] >= _LEAST
        and all(
            each.dtype == torch.float32 and each.device.type == "cpu" and each.layout == torch.strided
            for each in tensors
        )
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
        # The tensors of vmap and of forward gradients know no other functions.
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


class _FasterLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        if func is F.linear and not kwargs and _is_layer(*args):
            return _multiplied(*args)
        if func is torch.addmm and not kwargs and len(args) == 3:  # GPT-2's layers
            bias, x, weight = args
            if isinstance(weight, Tensor) and weight.ndim == 2 and _is_layer(x, weight.T, bias):
                return _multiplied(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def _is_layer(x: Any, weight: Any, bias: Any = None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(each) in (Tensor, nn.Parameter) for each in tensors)
        and is_worth_it(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        # A checkpoint has such hooks. Its second forward pass is outside the block, and must save the same.
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    apply: Any = _Linear.apply
    return apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """`linear` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias)  # the mode has looked whether it is worth it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        return (
            None if weight is None else matmul(grads[0], weight),
            None if x is None else matmul(rows.T, x.reshape(-1, x.shape[-1])),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
