"""Packed rows number by number; the layout and the choice of codes are said in rapidin.ops.packed."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

PackedDtype = Literal["int8", "int4", "sign"]

BITS: dict[str, int] = {"int8": 8, "int4": 4, "sign": 1}  # of a number, by dtype
PER_BYTE = {dtype: 8 // bits for dtype, bits in BITS.items()}
GROUP = 64  # bytes
INT4_STEP = 0.3352  # of the root mean square: where 16 uniform levels lose least of normal numbers


class Packed(Protocol):
    """Packed rows, as `rapidin.ops.Packed` holds them."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def dtype(self) -> PackedDtype: ...
    @property
    def width(self) -> int: ...
    @property
    def scale(self) -> Tensor | None: ...


def byte_and_plane(width: int, dtype: PackedDtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each number of a row is: its byte and its plane, [width] int64 each."""
    number = torch.arange(width, device=device)
    group = number // (GROUP * PER_BYTE[dtype])
    begin = group * GROUP * PER_BYTE[dtype]
    in_group = (width - begin).clamp_max(GROUP * PER_BYTE[dtype])
    size = (in_group + PER_BYTE[dtype] - 1) // PER_BYTE[dtype]
    return group * GROUP + (number - begin) % size, (number - begin) // size


def pack(x: Tensor, dtype: PackedDtype) -> tuple[Tensor, Tensor]:
    """x: [N, W] -> codes [N, bytes], scale [N] float32"""
    x = x.double()
    squares = x.square().sum(1)
    broken = ~squares.isfinite()
    levels, values = _codes(x.where(~broken[:, None], 0.0), dtype)
    scale = squares / (x * values).sum(1)
    scale = scale.where(squares != 0, 0.0).where(~broken, torch.nan).float()
    levels = levels.where(~broken[:, None], 0)
    if dtype == "int8":
        return levels.to(torch.int8), scale
    byte, plane = byte_and_plane(x.shape[1], dtype, x.device)
    codes = torch.zeros(len(x), int(byte.max()) + 1 if len(byte) else 0, dtype=torch.int64, device=x.device)
    codes.index_add_(1, byte, levels << plane * BITS[dtype])
    return codes.to(torch.uint8), scale


def _codes(x: Tensor, dtype: PackedDtype) -> tuple[Tensor, Tensor]:
    """x: [N, W] float64 -> what is stored, int64, and the numbers that it stands for, float64."""
    if dtype == "sign":
        return (x >= 0).long(), torch.where(x >= 0, 1.0, -1.0).double()
    if dtype == "int4":
        step = INT4_STEP * x.square().mean(1, keepdim=True).sqrt()
        floors = (x / step.where(step > 0, 1.0)).floor().clamp(-8, 7)
        return floors.long() + 8, floors + 0.5
    step = x.abs().amax(1, keepdim=True) / 127 if x.shape[1] else x.new_ones(len(x), 1)
    values = (x / step.where(step > 0, 1.0)).round()
    return values.long(), values


def decoded(packed: Packed) -> Tensor:
    """The numbers of packed rows, [N, W] float64."""
    values = packed.codes.double()
    if packed.dtype != "int8":
        byte, plane = byte_and_plane(packed.width, packed.dtype, values.device)
        bits = BITS[packed.dtype]
        levels = packed.codes.long()[:, byte] >> plane * bits & (1 << bits) - 1
        values = levels * 2.0 - 1.0 if packed.dtype == "sign" else levels - 7.5
    return values.double() if packed.scale is None else values.double() * packed.scale.double()[:, None]


def unpack(packed: Packed) -> Tensor:
    """-> [N, W] float32; see rapidin.ops.unpack."""
    return decoded(packed).float()
