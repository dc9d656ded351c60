"""The extension with the CUDA kernels: rapidin.ops._cuda where rapidin was built with it, else the one of the
distribution rapidin-cuda, or in tests one that runs its kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rapidin.errors import UserError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PACKED_DTYPES = {"int8": 3, "int4": 4, "sign": 5}

_extension: Any = None


def extension() -> Any:
    """The extension, imported when first needed. Raises ImportError where there is none, UserError where
    rapidin-cuda is of another version: the arguments of the kernels are no stable interface."""
    global _extension
    if _extension is None:
        try:
            from rapidin.ops import _cuda

            _extension = _cuda
        except ImportError as error:
            if not _distribution_found():
                raise ImportError(
                    "rapidin's CUDA kernels are not installed: pip install 'rapidin[cuda]', "
                    "install from source where nvcc is found (RAPIDIN_CUDA=on says why if it fails), "
                    "or ask for backend='triton'"
                ) from error
            _check_version()
            _extension = import_module("rapidin_cuda._cuda")
    return _extension


def installed() -> bool:
    """Whether there is an extension, of rapidin itself or of the distribution rapidin-cuda."""
    return find_spec("rapidin.ops._cuda") is not None or _distribution_found()


def _distribution_found() -> bool:
    return find_spec("rapidin_cuda") is not None


def _check_version() -> None:
    from rapidin import __version__

    found = metadata.version("rapidin-cuda")
    if found != __version__:
        raise UserError(
            f"rapidin-cuda {found} stands beside rapidin {__version__}, and must be of the same version",
            f"pip install 'rapidin-cuda=={__version__}'",
        )


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
