"""Rows in few bits: `Packed`, and the quantiser whose dot products are unbiased."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PackedDtype = Literal["int8", "int4", "sign"]
GROUP = 64  # bytes of a group of sign and int4 codes


@dataclass(frozen=True)
class Packed:
    codes: Tensor
    dtype: PackedDtype
    width: int
    scale: Tensor | None


def packed_bytes(width: int, dtype: str) -> int:
    return -(-width * {"int8": 8, "int4": 4, "sign": 1}[dtype] // 8)


def pack(x: Tensor, dtype: str) -> Packed:
    x = x.float()
    good = x.isfinite().all(1)
    x = torch.where(good[:, None], x, 0.0)
    if dtype == "sign":
        c = torch.where(x >= 0, 1.0, -1.0)
    elif dtype == "int4":
        step = 0.3352 * x.square().mean(1, keepdim=True).sqrt()
        c = ((x / step.clamp(min=1e-30)).floor() + 0.5).clamp(-7.5, 7.5)
    else:
        step = x.abs().amax(1, keepdim=True) / 127 if x.shape[1] else x.new_ones(len(x), 1)
        c = (x / step.clamp(min=1e-30)).round()
    dot = (x * c).sum(1)
    scale = torch.where(dot > 0, x.square().sum(1) / dot.clamp(min=1e-30), 0.0)
    scale = torch.where(good, scale, float("nan"))
    if dtype == "int8":
        return Packed(c.to(torch.int8), dtype, x.shape[1], scale)
    number = ((c > 0) if dtype == "sign" else (c + 7.5)).to(torch.uint8)
    return Packed(_bits(number, dtype), dtype, x.shape[1], scale)


def _bits(number: Tensor, dtype: str) -> Tensor:
    per, bits = (8, 1) if dtype == "sign" else (2, 4)
    out = []
    for start in range(0, number.shape[1], GROUP * per):
        piece = number[:, start : start + GROUP * per]
        size = -(-piece.shape[1] // per)
        piece = torch.nn.functional.pad(piece, (0, size * per - piece.shape[1])).view(len(number), per, size)
        byte = torch.zeros(len(number), size, dtype=torch.uint8)
        for p in range(per):
            byte |= piece[:, p] << (p * bits)
        out.append(byte)
    return torch.cat(out, 1) if out else torch.zeros(len(number), 0, dtype=torch.uint8)


def unpack(packed: Packed) -> Tensor:
    n = len(packed.codes)
    if packed.dtype == "int8":
        c = packed.codes.float()
    else:
        per, bits = (8, 1) if packed.dtype == "sign" else (2, 4)
        out, at = [], 0
        for start in range(0, packed.width, GROUP * per):
            rest = min(GROUP * per, packed.width - start)
            size = -(-rest // per)
            byte = packed.codes[:, at : at + size]
            at += size
            planes = torch.stack([(byte >> (p * bits)) & (2**bits - 1) for p in range(per)], 1)
            out.append(planes.reshape(n, -1)[:, :rest].float())
        c = torch.cat(out, 1) if out else torch.zeros(n, 0)
        c = 2 * c - 1 if packed.dtype == "sign" else c - 7.5
    return c if packed.scale is None else c * packed.scale.float()[:, None]
