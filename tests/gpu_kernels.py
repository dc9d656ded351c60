"""What stands in for the kernels of `rapidin.ops` on the GPU of `gpu_flow`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from rapidin.ops import backends

if TYPE_CHECKING:
    from gpu_flow import Gpu

_the: Any = None


def install(gpu: Gpu, patch: pytest.MonkeyPatch) -> None:
    """Ops on tensors of the GPU find the functions of this module."""
    patch.setitem(globals(), "_the", gpu)
    default = backends._default
    patch.setattr(
        backends,
        "_default",
        lambda op, device, given: "gpu" if device.type == "cuda" else default(op, device, given),
    )
    patch.setitem(backends._MODULES, "gpu", __name__)


def __getattr__(op: str) -> Callable[..., Any]:
    if op.startswith("__"):
        raise AttributeError(op)
    return lambda *args, **named: _rule(_the, op, args, named)


def _rule(gpu: Gpu, op: str, args: Any, named: Any) -> Any:
    """Any op: by the kernels of the CPU. Reads all tensors that it is given, writes those that it gives."""
    import torch

    gpu.calls[op] += 1
    function = getattr(import_module("rapidin.ops.cpu"), op)
    reads = gpu.all_memory([*args, *named.values()])
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        found = function(*gpu.held(args), **gpu.held(named))

    made = gpu.wrapped(found, {})
    gpu.use(op, reads, gpu.all_memory(made))
    return made
