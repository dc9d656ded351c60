"""Shapes, dtypes and layouts at the edges, once, for tests and benchmarks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rapidin.ops import _cpu

SEED = 0x9E3779B97F4A7C15  # both halves of the 64 bits matter
# Where the backends "triton" and "cuda" take their tensors: on the CPU they are interpreted and emulated.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTRUCTION_SETS = tuple(_cpu.supported_sets())

# (batch, tokens, in, out): empty, one row, no multiple of anything, longer and shorter than the sketch
LINEAR_SHAPES = (
    (0, 3, 4, 5),
    (2, 0, 4, 5),
    (1, 1, 1, 1),
    (1, 1, 130, 7),
    (3, 5, 33, 70),
    (2, 9, 8, 300),
    (2, 40, 300, 8),
    (2, 3, 257, 129),
)
LINEAR_DIMS = (1, 2, 7, 64, 100, 256)
FLAT_DIMS = (1, 2, 16, 64, 128, 384, 2048)
FLAT_SIZES = ((1,), (127,), (0,), (128,), (129,), (3, 50), (2, 128, 5), (4000,))


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _cpu.current_set()
    _cpu.use_set(name)
    try:
        yield
    finally:
        _cpu.use_set(before)


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, size: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers as floats: sums of their products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-size, size + 1, shape, generator=generator).to(dtype)


def away_from_ties(rows: int, width: int, dtype: str, seed: int = 0) -> Tensor:
    """Rows whose numbers lie well within their steps, so that rounding cannot move them to others."""
    x = normal(rows, width, seed=seed).double()
    for _ in range(20):
        if dtype == "sign":
            return x.float()
        step = (
            x.abs().amax(1, keepdim=True) / 127
            if dtype == "int8"
            else 0.3352 * x.square().mean(1, keepdim=True).sqrt()
        )
        place = x / step + (0.5 if dtype == "int8" else 0.0)
        near = (place - place.round()).abs() < 1e-3
        x = torch.where(near, x + 0.01 * step, x)
    return x.float()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values as other code may hand them over."""
    spread = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    spread[..., 1 : 1 + 2 * x.shape[-1] : 2] = x
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    wide[..., 2 : 2 + x.shape[-1]] = x
    return {
        "contiguous": x.contiguous(),
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every other element": spread[..., 1 : 1 + 2 * x.shape[-1] : 2],
        "part of a row": wide[..., 2 : 2 + x.shape[-1]],
    }


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    """Compares by the norm of the last axis: a bin may be near zero while its neighbours are not."""
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    wanted = wanted.double()
    error = (got.double() - wanted).norm(dim=-1)
    size = wanted.norm(dim=-1)
    assert bool((error <= tolerance * size + 1e-30).all()), (
        f"relative error {float((error / size.clamp_min(1e-30)).max()):.2e} above {tolerance:.0e}"
    )
