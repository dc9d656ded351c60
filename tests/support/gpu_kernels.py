"""What stands in for the kernels of `rapidin.ops` on the GPU of `gpu_flow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from rapidin.ops import backends, cuda

if TYPE_CHECKING:
    from gpu_flow import Gpu, Memory

_the: Any = None


def choose(op: str, device: torch.device, given: tuple[Any, ...]) -> str:
    """The backend of an op: this module for tensors of the GPU."""
    return "gpu" if device.type == "cuda" else backends.default(op, device, given)


@contextmanager
def installed(gpu: Gpu) -> Iterator[None]:
    """Inside the block ops on tensors of the GPU find the functions of this module."""
    global _the
    with ExitStack() as stack:
        stack.enter_context(backends.using(choose, {"gpu": __name__}))
        if gpu.kernels == "cuda":
            from emulator.build import emulated

            stack.enter_context(cuda.using(_Extension(gpu, emulated())))
        before, _the = _the, gpu
        try:
            yield
        finally:
            _the = before


def __getattr__(op: str) -> Callable[..., Any]:
    if op.startswith("__"):
        raise AttributeError(op)
    return lambda *args, **named: _run(_the, op, args, named)


def _run(gpu: Gpu, op: str, args: Any, named: Any) -> Any:
    gpu.calls[op] += 1
    if gpu.kernels == "cuda" and op in backends.CUDA_OPS:
        given = (args[0], args[1], args[2]) if op == "linear_sketch" else args
        if cuda.supports(op, *given):
            with gpu.pointers():
                return getattr(cuda, op)(*args, **named)
    return _rule(gpu, op, args, named)


def _rule(gpu: Gpu, op: str, args: Any, named: Any) -> Any:
    """Any op: by the kernels of the CPU. Reads all tensors that it is given, writes those that it gives."""
    function = getattr(import_module("rapidin.ops.cpu"), op)
    reads = gpu.all_memory([*args, *named.values()])
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        found = function(*gpu.held(args), **gpu.held(named))
    made = gpu.wrapped(found, {})
    gpu.use(op, reads, gpu.all_memory(made))
    return made


_ON_THE_CPU = {"linear_sketch_table"}  # functions that take addresses of the CPU
_ADDRESSES = range(1 << 32, 1 << 48)  # sizes are below, seeds of layers nearly always above


class _Extension:
    """The emulated extension, which looks every address up before a kernel gets it."""

    def __init__(self, gpu: Gpu, module: Any) -> None:
        self._gpu, self._module = gpu, module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if not callable(function) or name in _ON_THE_CPU:
            return function

        def run(*args: Any) -> Any:
            given = [self._memory(name, address) for address in _numbers(args) if address in _ADDRESSES]
            if name == "flat_sketch":  # a table of addresses, one for each of so many tensors
                table, tensors = self._gpu.at(args[0]), args[1]
                if table is not None:
                    given += [self._memory(name, address) for address in self._gpu.words(args[0], tensors)]
            if given:
                self._gpu.use(name, [memory for memory in given if memory is not None], [])
            return function(*args)

        return run

    def _memory(self, kernel: str, address: int) -> Memory | None:
        found = self._gpu.at(address)
        if found is None:
            self._gpu.problem(f"{kernel} gets the address {address:#x}, which is no tensor's of the GPU")
        return found


def _numbers(given: Any) -> Iterator[int]:
    if isinstance(given, dict):
        given = tuple(given.values())
    if isinstance(given, tuple | list):
        for each in given:
            yield from _numbers(each)
    elif isinstance(given, int) and not isinstance(given, bool):
        yield given
