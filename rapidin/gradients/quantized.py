"""Weights that are stored in fewer bits: whether gradients pass through their layers, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rapidin.errors import UserError, reason_of

_ALLOWED = 0.1  # relative error of a layer's gradient; inputs that are quantized too bring a few hundredths
_TOKENS = 32
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_gradients(model: nn.Module) -> None:
    """Raises UserError if a model has quantized layers that propagate no gradients, or wrong ones.

    Some kinds are made for inference alone, and lose the gradient without an error. So one layer of each kind
    is tested. For bitsandbytes' 4-bit layers this is prevented: on a CPU with AVX512-BF16 they pack their
    weights again when they first run in evaluation mode on an input without gradient, as when the model
    generates. Packed layers are faster, but do not propagate gradients, and since their scales are rounded,
    they cannot be unpacked exactly.
    """
    _unpack(model)
    tried = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"bitsandbytes has packed the 4-bit weight of '{name}' for generation on this CPU, and "
                "packed weights do not propagate gradients",
                "load the model again, and pass it to rapidin before it generates",
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        kind = (type(module), type(weight), getattr(weight, "dtype", None))
        if kind not in tried and is_quantized(module):
            tried.add(kind)
            problem = _problem(module, model)
            if problem:
                raise UserError(
                    f"gradients cannot be computed through the quantized layer '{name}' "
                    f"({type(module).__name__}): {problem}",
                    "load the model without quantization, or with another kind of quantization",
                )


def _unpack(model: nn.Module) -> None:
    """Unpack the weights of compressed-tensors, which the model's first call would unpack anyway: a layer by
    itself has no weight before."""
    for module in model.modules():
        if hasattr(module, "ct_decompress_hook"):
            quantizer: Any = module.hf_quantizer
            quantizer.compressor.decompress_model(module)


def plain_tensors(value: Tensor) -> Iterator[Tensor]:
    """The tensors in memory of a weight: itself, or the parts (numbers, scales, zeros) of torchao's and
    other kinds of tensors that consist of several, in order."""
    flatten: Any = getattr(value, "__tensor_flatten__", None)
    if flatten is None or hasattr(value, "to_local"):
        yield value
        return
    for name in flatten()[0]:
        yield from plain_tensors(getattr(value, name))


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has other weights than plain numbers."""
    if not hasattr(module, "in_features") or any(p.is_meta for p in module.parameters(recurse=False)):
        return False
    if any(True for _ in module.children()):
        return False  # an adapter around a layer
    if hasattr(module, "quantization_scheme"):  # of compressed-tensors, which may round inputs, too
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        return any(not tensor.is_floating_point() for tensor in tensors)
    return weight.dtype not in _PLAIN or hasattr(weight, "__tensor_flatten__")


def _problem(layer: Any, model: nn.Module) -> str:
    """What is wrong with the gradient of a linear layer's input; "" if nothing is.

    With y = W x, the gradient of v y is u = W^T v, and v W u = u u if it is right.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype, device = next(floats, torch.float32), tensors[0].device
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, _TOKENS, layer.in_features, dtype=dtype, device=device, requires_grad=True)
    training = layer.training
    layer.eval()
    try:
        with torch.enable_grad():
            zero = layer(x)
            v = torch.randn(zero.shape, generator=generator, device="cpu").to(zero)
            if not zero.requires_grad:
                return "it does not propagate gradients"
            (u,) = torch.autograd.grad(zero, x, v)
            size = u.double().square().sum()
            if not bool(size > 0):
                return "it does not propagate gradients"
            with torch.no_grad():
                product = ((layer(u.clone().requires_grad_()) - zero).double() * v.double()).sum()
    except Exception as error:  # each kind raises its own type for what it does not support
        return reason_of(error)
    finally:
        layer.train(training)
    wrong = float((product - size).abs() / size)
    return "" if wrong < _ALLOWED else f"its gradients have a relative error of {wrong:.2g}"
