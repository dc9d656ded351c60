"""pack, unpack: rows of floats as rows of 8-bit, 4-bit or 1-bit codes with one scale each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rapidin.ops.backends import find
from rapidin.ops.checks import SKETCHED, check_tensor
from rapidin.ops.reference.packed import BITS as BITS
from rapidin.ops.reference.packed import GROUP, PER_BYTE
from rapidin.ops.reference.packed import PackedDtype as PackedDtype


@dataclass(frozen=True)
class Packed:
    """Packed rows: row n's numbers are scale[n] * its codes' values (scale None: 1).

    codes: [N, packed_bytes(width, dtype)] uint8, for "int8" int8; a view of a memory map will do, and rows
        may lie further apart than they are long
    scale: [N] float32 or float16; NaN for a row that cannot be scored

    A row of "int8" is its numbers. A row of "sign" (P = 8 numbers a byte) or "int4" (P = 2) is groups of
    64 bytes, the last one shorter: a group of B bytes holds P * B numbers, number p * B + j in bits
    [p * 8 / P, (p + 1) * 8 / P) of its byte j. The last group has as few bytes as hold the rest, and bits
    without a number are 0. A bit of "sign" stands for -1 (0) or +1 (1), a nibble n of "int4" for n - 7.5.
    Raises TypeError or ValueError where the tensors are not as above.
    """

    codes: Tensor
    dtype: PackedDtype
    width: int
    scale: Tensor | None

    def __post_init__(self) -> None:
        size = packed_bytes(self.width, self.dtype)
        code_dtype = torch.int8 if self.dtype == "int8" else torch.uint8
        check_tensor("Packed", "codes", self.codes, (code_dtype,), ndim=2)
        if self.codes.shape[1] != size:
            raise ValueError(
                f"Packed: {self.width} numbers of {self.dtype} are {size} bytes, "
                f"got codes of {self.codes.shape[1]}"
            )
        if self.scale is None:
            return
        check_tensor("Packed", "scale", self.scale, (torch.float32, torch.float16), ndim=1)
        if len(self.scale) != len(self.codes):
            raise ValueError(
                f"Packed: scale must have one entry for each of the {len(self.codes)} rows, "
                f"got {len(self.scale)}"
            )


def packed_bytes(width: int, dtype: PackedDtype) -> int:
    """The bytes of a row of `width` numbers. Raises ValueError on an unknown dtype or a negative width."""
    if dtype not in BITS:
        raise ValueError(f"packed dtype must be one of {', '.join(BITS)}, got {dtype!r}")
    if width < 0:
        raise ValueError(f"width must not be negative, got {width}")
    groups, remainder = divmod(width, GROUP * PER_BYTE[dtype])
    return groups * GROUP + -(-remainder // PER_BYTE[dtype])


def pack(x: Tensor, dtype: PackedDtype, *, backend: str | None = None) -> Packed:
    """Rows of floats as packed rows whose inner products with the rows are right by construction.

    x: [N, W] float32, float16 or bfloat16 -> N rows of W numbers, scale float32

    "sign": +1 where x >= 0, else -1. "int4": the middle of x's step, steps of 0.3352 root mean squares of the
    row (the best of 16 uniform levels for normal numbers), clamped to the outer ones. "int8": the nearest of
    127 steps to either side, the largest number at the end. The scale is |x|^2 / <x, codes>, so that
    <decoded x, x> = |x|^2: over random rotations of x, the inner product of the decoded row with any vector
    is unbiased. (The correction of RaBitQ: J. Gao, C. Long, "RaBitQ: Quantizing High-Dimensional Vectors with
    a Theoretical Error Bound for Approximate Nearest Neighbor Search", SIGMOD 2024.)
    A row of zeros has scale 0; one with NaN or Inf has codes 0 and scale NaN.
    Raises TypeError or ValueError on arguments that are not as above.
    """
    check_tensor("pack", "x", x, SKETCHED, ndim=2)
    packed_bytes(x.shape[1], dtype)
    codes, scale = find("pack", backend, x.device)(x.detach(), dtype)
    return Packed(codes, dtype, x.shape[1], scale)


def unpack(packed: Packed, *, backend: str | None = None) -> Tensor:
    """The numbers of packed rows, [N, W] float32. Raises TypeError on another argument."""
    if not isinstance(packed, Packed):
        raise TypeError(f"unpack: packed must be a rapidin.ops.Packed, got {type(packed).__name__}")
    x: Tensor = find("unpack", backend, packed.codes.device)(packed)
    return x
