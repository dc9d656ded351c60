"""Which function runs an op: the one table of (op, backend), or a clear reason why none does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

KNOWN = ("reference", "cpu", "triton", "cuda")

# A backend's module is imported when it is first used. All of its functions take the op's checked arguments.
_MODULES = {
    "reference": "rapidin.ops.reference",
    "cpu": "rapidin.ops.cpu",
    "triton": "rapidin.ops.triton",
    "cuda": "rapidin.ops.cuda",
}
# The ops that CUDA C++ has kernels for; on a GPU these are the default where the extension was built for it.
# docs/reference/kernels.md says why.
CUDA_OPS = frozenset({"linear_sketch", "flat_sketch", "topk_scan", "topk_scan_both_ends"})


# Names the backend of an op for a device and the arguments that decide it.
Choose = Callable[[str, torch.device, tuple[Any, ...]], str]


@dataclass(frozen=True)
class Installed:
    """Which kernels for GPUs there are: CUDA's extension, and Triton."""

    cuda: bool
    triton: bool

    @staticmethod
    @cache
    def here() -> Installed:
        """Those of this installation."""
        return Installed(import_module(_MODULES["cuda"]).installed(), find_spec("triton") is not None)


def find(op: str, backend: str | None, device: torch.device, *arguments: Any) -> Callable[..., Any]:
    """The function that runs `op` on tensors of `device`; arguments: what decides whether CUDA has a kernel.

    Raises ValueError where the backend is unknown, lacks the op, or is not for this device, ImportError where
    it was not built or installed.
    """
    if backend is not None and backend not in KNOWN:
        raise ValueError(f"{op}: unknown backend {backend!r}; known are {', '.join(KNOWN)}")
    name = backend if backend is not None else _choose(op, device, arguments)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"{op}: backend 'cpu' takes tensors on the CPU, got device '{device}'; call .cpu() first"
        )
    if name == "cuda" and op not in CUDA_OPS:
        raise ValueError(f"{op}: backend 'cuda' has no kernel for it; ask for backend='triton'")
    if name in ("triton", "cuda") and device.type != "cuda" and not simulated(name):
        raise ValueError(
            f"{op}: backend {name!r} takes tensors on a GPU, got device '{device}'; call .cuda() first"
        )
    if backend == "cuda":
        why = import_module(_MODULES["cuda"]).excludes(device)
        if why is not None:
            raise ValueError(f"{op}: backend 'cuda' {why}; ask for backend='triton'")
    function: Callable[..., Any] = getattr(import_module(_MODULES[name]), op)
    return _on(device, function) if device.type == "cuda" else function


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its tensors' GPU as the current one: that is where Triton launches."""

    def run(*arguments: Any, **named: Any) -> Any:
        with torch.cuda.device(device):
            return function(*arguments, **named)

    return run


def simulated(backend: str) -> bool:
    """Whether a GPU backend runs on the CPU, as in tests: Triton's interpreter, emulated CUDA."""
    if backend == "triton":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return bool(import_module(_MODULES["cuda"]).emulated())


def default(
    op: str, device: torch.device, arguments: tuple[Any, ...], installed: Installed | None = None
) -> str:
    """The backend of an op that names none; installed: by default what is installed here.

    Raises ValueError where no backend is for this device.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        installed = Installed.here() if installed is None else installed
        why = None
        if op in CUDA_OPS and installed.cuda:
            cuda = import_module(_MODULES["cuda"])
            why = cuda.excludes(device)
            if why is None and cuda.supports(op, *arguments):
                return "cuda"
        if installed.triton:
            return "triton"
        if why is not None:
            raise ValueError(f"{op}: rapidin's CUDA extension {why}; pip install 'rapidin[gpu]' for Triton")
        raise ValueError(
            f"{op}: no kernels for device '{device}' are installed; pip install 'rapidin[gpu]' or "
            "'rapidin[cuda]', or build from source where nvcc is found"
        )
    raise ValueError(
        f"{op}: there is no kernel for device '{device}'; move the tensors to the CPU, "
        "or ask for backend='reference'"
    )


_choose: Choose = default


@contextmanager
def using(choose: Choose, modules: Mapping[str, str] | None = None) -> Iterator[None]:
    """Inside the block `choose` names the backend of ops that name none, in place of `default`.

    modules: of backends besides those that are known, by name, each with the ops as functions.
    """
    global _choose
    before, known = _choose, dict(_MODULES)
    _choose = choose
    _MODULES.update(modules or {})
    try:
        yield
    finally:
        _choose = before
        _MODULES.clear()
        _MODULES.update(known)
