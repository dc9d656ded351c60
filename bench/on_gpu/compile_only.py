"""Triton's kernels compiled ahead: each launch of this process compiles its kernel and is not made.

The launchers run as ever, on real tensors of the GPU, so that types, divisibility and constants are those of
the launches to come, and Triton finds the kernel in its folder then. That folder is TRITON_CACHE_DIR.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compile_only() -> None:
    """From now on, for the whole process."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **named)

    JITFunction.run = run
    # What no kernel has written may be an index to the torch operations after it.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    Tensor.new_empty = Tensor.new_zeros  # type: ignore[method-assign]
