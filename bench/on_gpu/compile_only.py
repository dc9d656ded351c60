"""Compiles Triton's kernels ahead: a launch in this process only compiles its kernel.

The launchers run as usual, on real GPU tensors, so that types, divisibility and constants are those of later
launches, which then find the kernel in Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compile_only() -> None:
    """Make all later launches of this process compile only."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **named)

    JITFunction.run = run
    # Kernels do not write their outputs now, and torch may use these as indices: so they must be zero.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    Tensor.new_empty = Tensor.new_zeros  # type: ignore[method-assign]
