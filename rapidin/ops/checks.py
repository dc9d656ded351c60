"""Checks that several ops share. Messages say what was expected, what was got, and how to mend it."""

from collections.abc import Sequence

import torch
from torch import Tensor

SKETCHED = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(
    op: str, name: str, x: Tensor, dtypes: Sequence[torch.dtype], ndim: int | None = None
) -> None:
    """Raises TypeError unless x is dense and of one of `dtypes`, ValueError unless it has `ndim` axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must be {known}, got {str(x.dtype).removeprefix('torch.')}; convert it with .to()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout}; call .to_dense() first")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} axes, got shape {tuple(x.shape)}")


def check_same_device(op: str, named: dict[str, Tensor | None]) -> torch.device:
    """Raises ValueError unless all tensors lie on one device; returns it."""
    devices = {name: x.device for name, x in named.items() if x is not None}
    if len(set(devices.values())) > 1:
        locations = ", ".join(f"{name} on '{device}'" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {locations}")
    return next(iter(devices.values()))


def check_sketch(op: str, dim: int, seed: int) -> None:
    """Raises TypeError or ValueError unless dim is in [1, 2**31) and seed in [0, 2**64)."""
    for name, value, end in (("dim", dim, 2**31), ("seed", seed, 2**64)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        if not (0 if name == "seed" else 1) <= value < end:
            least = 0 if name == "seed" else 1
            raise ValueError(f"{op}: {name} must be at least {least} and below {end}, got {value}")


def nothing(*shape: int, device: torch.device) -> Tensor:
    """The sketch of nothing: zeros, float32. Backends are asked only where there is something to sketch."""
    return torch.zeros(shape, dtype=torch.float32, device=device)
