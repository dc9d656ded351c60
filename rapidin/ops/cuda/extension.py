"""The extension rapidin.ops._cuda, or in tests one that runs its kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PACKED_DTYPES = {"int8": 3, "int4": 4, "sign": 5}

_extension: Any = None


def extension() -> Any:
    """rapidin.ops._cuda, imported when first needed. Raises ImportError where it was not built."""
    global _extension
    if _extension is None:
        try:
            from rapidin.ops import _cuda
        except ImportError as error:
            raise ImportError(
                "rapidin's CUDA kernels were not built: install from source where nvcc is found "
                "(RAPIDIN_CUDA=on says why if it fails), or ask for backend='triton'"
            ) from error
        _extension = _cuda
    return _extension


def use(module: Any) -> Any:
    """Use another build of the extension, such as the emulated one in tests. Returns the previous one."""
    global _extension
    before, _extension = _extension, module
    return before


@contextmanager
def using(module: Any) -> Iterator[None]:
    """Inside the block another build of the extension is used; None: the one that is installed."""
    before = use(module)
    try:
        yield
    finally:
        use(before)


def emulated() -> bool:
    """Whether the kernels run on the CPU."""
    return _extension is not None and bool(_extension.emulated)


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """(device index, current stream) of a tensor's device, as the extension takes them."""
    if x.device.type != "cuda":
        return 0, 0
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream
