"""Fixed dropout masks: a mask that is the same for all texts makes another model of the same weights.

Means over several masks are the ensemble of one model (IP ensemble, Yang et al., TMLR 2026).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rapidin.errors import UserError
from rapidin.gradients.parameters import Target, block_seed


@dataclass(frozen=True, slots=True)
class DropoutMask:
    """A fixed mask of the input features of every linear layer that counts.

    A share `rate` of a layer's features is zero and the others are multiplied by 1 / (1 - rate); the seed and
    the layer's name determine which. Raises UserError for a rate outside [0, 1).
    """

    rate: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"the dropout rate must be at least 0 and below 1, got {self.rate:g}")

    def to_json(self) -> dict[str, Any]:
        """The mask as a manifest records it."""
        return {"rate": self.rate, "seed": self.seed}

    @contextlib.contextmanager
    def applied(self, model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
        """Inside the block the model has this mask."""
        if not self.rate:
            yield
            return
        modules = dict(model.named_modules())
        names = {use.module for target in targets for use in target.uses if use.kind in ("linear", "conv1d")}
        handles = [
            modules[name].register_forward_pre_hook(_MaskHook(self.rate, block_seed(self.seed, name)))
            for name in sorted(names)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _MaskHook:
    """A forward pre-hook that multiplies a module's input by a mask, made on the first call."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed
        self.mask: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if self.mask is None or self.mask.device != x.device:
            generator = torch.Generator("cpu").manual_seed(self.seed % 2**63)
            kept = torch.rand(x.shape[-1], generator=generator, device="cpu") >= self.rate
            self.mask = (kept / (1 - self.rate)).to(x.device)
        return (x * self.mask.to(x.dtype), *args[1:])
