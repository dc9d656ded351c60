"""The gradient of a convolution's weight as factors: the input's patches, and the output gradients.

A convolution is a linear layer at each position of its output, whose input is the patch that the kernel
covers there (Grosse & Martens, ICML 2016, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rapidin.gradients.calls import NotBatchedError

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module computes what torch's convolutions do, and nothing else."""
    for kind in _KINDS:
        if isinstance(module, kind):
            own = type(module)
            return own.forward is kind.forward and own._conv_forward is kind._conv_forward
    return False


def as_linear(
    module: Any,
    inputs: Tensor,
    grad: Tensor,
    uses: Sequence[tuple[int, Any]],
    gradient_pass: Any,
) -> tuple[Tensor, Tensor, Sequence[tuple[int, Any]]]:
    """A call of a module, which stays as it is unless that is a convolution: then as the call of a linear
    layer, (inputs [B, positions, I], gradients of the outputs [B, positions, O], uses).

    uses, gradient_pass: as `rapidin.gradients.collector.ModuleHooks` has them. The gradient of a weight
    with groups goes to the pass formed, and its use is left out. Raises NotBatchedError for inputs without an
    axis of the examples.
    """
    if not is_convolution(module):
        return inputs, grad, uses
    if inputs.ndim != len(module.kernel_size) + 2 or inputs.shape[0] != gradient_pass.input_rows:
        raise NotBatchedError(gradient_pass.targets[uses[0][0]].name)
    if module.groups == 1:
        return patches(module, inputs), positions_first(grad), uses
    for n in [n for n, use in uses if use.kind == "convolution"]:
        gradient_pass.add_raw(n, grouped_gradient(module, inputs, grad, gradient_pass.rows))
    return inputs, positions_first(grad), [(n, use) for n, use in uses if use.kind != "convolution"]


def positions_first(x: Tensor) -> Tensor:
    """[B, C, *S] -> [B, positions, C]."""
    return x.flatten(2).mT


def patches(module: Any, inputs: Tensor) -> Tensor:
    """The patch of the inputs [B, C, *S] at each position of the output: [B, positions, C * kernel size], C
    over all groups."""
    if module.padding_mode != "zeros":
        x = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif any(module._reversed_padding_repeated_twice):
        x = F.pad(inputs, module._reversed_padding_repeated_twice)
    else:
        x = inputs
    dims = len(module.kernel_size)
    for axis, (size, step, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.permute(order).flatten(1 + dims).flatten(1, dims)


def grouped_gradient(module: Any, inputs: Tensor, grad: Tensor, examples: int) -> Tensor:
    """The formed gradients [examples, O, I] of a weight with groups, given the inputs [B, C, *S] and the
    gradients of the outputs [B, O, *S], B a multiple of the examples.

    As factors the outputs of each group would need positions of their own, so the factors would be larger
    than the gradient, whose I is that of one group.
    """
    columns = patches(module, inputs).float()
    rows = positions_first(grad).float()
    columns = columns.reshape(examples, -1, module.groups, columns.shape[-1] // module.groups)
    rows = rows.reshape(examples, -1, module.groups, rows.shape[-1] // module.groups)
    return torch.einsum("btgo,btgi->bgoi", rows, columns).flatten(1, 2)
