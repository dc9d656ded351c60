"""pack, unpack, rotate and unit_blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from rapidin.kernels import pack as pack_kernels
from rapidin.kernels import rotate as rotate_kernels
from rapidin.ops.packed import Packed, PackedDtype, packed_bytes
from rapidin.ops.rotate import WIDEST, Cut


def pack(x: Tensor, dtype: PackedDtype) -> tuple[Tensor, Tensor]:
    n, width = x.shape
    code_dtype = torch.int8 if dtype == "int8" else torch.uint8
    codes = torch.empty(n, packed_bytes(width, dtype), dtype=code_dtype, device=x.device)
    scale = torch.empty(n, device=x.device, dtype=torch.float32)
    pack_kernels.pack(_rows(x), codes, scale, dtype)
    return codes, scale


def unpack(packed: Packed) -> Tensor:
    codes = _rows(packed.codes)
    x = torch.empty(len(codes), packed.width, device=codes.device, dtype=torch.float32)
    pack_kernels.unpack(codes, packed.scale, x, packed.dtype)
    return x


def rotate(x: Tensor, *, seed: int, inverse: bool, mean: Tensor | None, cut: Cut | None) -> Tensor:
    n, blocks, width = x.shape
    if width > WIDEST:
        raise ValueError(
            f"rotate: blocks on a GPU have at most {WIDEST} numbers, got {width}; call .cpu() first"
        )
    out = torch.empty(n, blocks * width if cut is None else cut.kept, device=x.device, dtype=torch.float32)
    rotate_kernels.rotate(
        _rows(x),
        out,
        seed=seed,
        inverse=inverse,
        mean=None if mean is None else mean.contiguous(),
        begin=None if cut is None else cut.begin,
        size=None if cut is None or cut.size is None else cut.size.contiguous(),
    )
    return out.view(x.shape) if cut is None else out


def unit_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    unit = torch.empty(x.shape, device=x.device, dtype=torch.float32)
    length = torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32)
    if unit.numel():
        width = x.shape[-1]
        rotate_kernels.unit_blocks(_rows(x.reshape(-1, width)), unit.view(-1, width), length.view(-1))
    else:
        length.zero_()
    return unit, length


def _rows(x: Tensor) -> Tensor:
    """With neighbours in memory along the last axis, as the kernels read."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# ---- topk_scan ----

_PROGRAMS_A_MULTIPROCESSOR = 4
_SIMULATED = 3  # multiprocessors where there is no GPU
_TERMS = {"float32": 1, "float16": 2, "bfloat16": 3}
_KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
