"""Which function runs an op: the one table of (op, backend), or a clear reason why none does."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

KNOWN = ("reference", "cpu", "triton", "cuda")

# A backend's module is imported when it is first used. All of its functions take the op's checked arguments.
_MODULES = {"reference": "rapidin.reference", "cpu": "rapidin.ops.cpu"}
_BY_DEVICE = {"cpu": "cpu"}


def find(op: str, backend: str | None, device: torch.device) -> Callable[..., Any]:
    """The function that runs `op` on tensors of `device`.

    Raises ValueError where the backend is unknown, not built yet, or not for this device.
    """
    if backend is not None and backend not in KNOWN:
        raise ValueError(f"{op}: unknown backend {backend!r}; known are {', '.join(KNOWN)}")
    name = backend if backend is not None else _BY_DEVICE.get(device.type)
    if name is None or name not in _MODULES:
        wanted = f"backend {name!r}" if name else f"kernel for device '{device}'"
        raise ValueError(
            f"{op}: this version has no {wanted}; move the tensors to the CPU, or ask for backend='reference'"
        )
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"{op}: backend 'cpu' takes tensors on the CPU, got device '{device}'; call .cpu() first"
        )
    function: Callable[..., Any] = getattr(import_module(_MODULES[name]), op)
    return function
