"""The other ways, as their users run them on a GPU. RapidIn's shuffles and the count sketch by index_add are
those of `gradient_sketches.py`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from on_gpu.cases import MissingError
from rapidin.ops import Packed

GROUP = 64  # bytes, as rapidin.ops.Packed lays them out
NUMBERS = {"int8": 1, "int4": 2, "sign": 8}  # a byte


def needed(name: str) -> Any:
    """A module of another project; MissingError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"{name} is not installed ({error})") from None


def double_sided(inputs: Tensor, grads: Tensor, k: int) -> Callable[[], Tensor]:
    """A random projection of each side, then the product: what LoGra and Bergson do, to k numbers in all."""
    side = 2 ** (int(math.log2(k)) // 2)
    for_inputs = torch.randn(inputs.shape[2], k // side, device=inputs.device).to(inputs.dtype)
    for_grads = torch.randn(grads.shape[2], side, device=grads.device).to(grads.dtype)
    return lambda: torch.bmm((grads @ for_grads).mT, inputs @ for_inputs).flatten(1)


def sjlt(elements: int, dim: int, device: torch.device) -> Callable[[Sequence[Tensor]], Tensor]:
    projection = needed("sjlt").SJLTProjection(elements, dim, c=1, device=str(device))

    def project(tensors: Sequence[Tensor]) -> Tensor:
        result: Tensor = projection(torch.cat([x.flatten() for x in tensors])[None])
        return result

    return project


def fast_jl(x: Tensor, dim: int, units: int) -> Callable[[], Tensor]:
    """TRAK's dense projection of x, [8, n], which is as few rows as it takes."""
    module = needed("fast_jl")
    return lambda: module.project_rademacher_8(x, dim, 0, units)


# ------------------------------------------------------------------------------------------------- scans


def unpacked(packed: Packed, first: int, end: int) -> Tensor:
    """Rows of a packed cache as float16, by torch's integer operations; without their scale."""
    codes, width = packed.codes[first:end], packed.width
    if packed.dtype == "int8":
        return codes.half()
    planes = NUMBERS[packed.dtype]
    bits = 8 // planes
    whole = codes.shape[1] // GROUP * GROUP
    parts = [codes[:, :whole].unflatten(1, (-1, GROUP)), codes[:, whole:].unsqueeze(1)]
    shifts = torch.arange(planes, device=codes.device, dtype=torch.uint8)[:, None] * bits
    listed = []
    for part in parts:
        levels = (part.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
        listed.append(levels.flatten(1))
    levels = torch.cat(listed, dim=1)[:, :width].half()
    return levels * 2 - 1 if packed.dtype == "sign" else levels - 7.5


def _chunks(n: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, (1 << 28) // width)
    for first in range(0, n, step):
        yield first, min(n, first + step)


def torch_scan(cache: Tensor | Packed, queries: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    """Products of some rows at a time, and topk of each and of all, for both ends."""
    n = len(cache.codes if isinstance(cache, Packed) else cache)
    width = cache.width if isinstance(cache, Packed) else cache.shape[1]
    small = queries.half()

    def scan() -> tuple[Tensor, ...]:
        ends: list[list[Tensor]] = [[], [], [], []]
        for first, end in _chunks(n, width):
            if isinstance(cache, Packed):
                scores = (small @ unpacked(cache, first, end).T).float()
                if cache.scale is not None:
                    scores *= cache.scale[first:end].float()
            else:
                scores = (small @ cache[first:end].T).float()
            for at, largest in ((0, True), (2, False)):
                found = scores.topk(min(k, end - first), dim=1, largest=largest)
                ends[at].append(found.values)
                ends[at + 1].append(found.indices + first)
        joined = [torch.cat(parts, dim=1) for parts in ends]
        out: list[Tensor] = []
        for at, largest in ((0, True), (2, False)):
            best = joined[at].topk(min(k, n), dim=1, largest=largest)
            out += [best.values, joined[at + 1].gather(1, best.indices)]
        return tuple(out)

    return scan


def faiss_index(cache: Tensor) -> Any:
    """faiss' exhaustive index on the GPU, in float16."""
    faiss = needed("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        raise MissingError("this faiss was built without GPUs")
    settings = faiss.GpuIndexFlatConfig()
    settings.useFloat16 = True
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), cache.shape[1], settings)
    for part in cache.split(1 << 16):
        index.add(part.float().cpu().numpy())
    return index


def faiss_scan(index: Any, queries: Tensor, k: int) -> Callable[[], tuple[Tensor, ...]]:
    """Both ends: faiss has the largest alone, so the smallest are those of the negated queries."""
    q = queries.cpu().numpy()

    def scan() -> tuple[Tensor, ...]:
        top, top_rows = index.search(q, k)
        bottom, bottom_rows = index.search(-q, k)
        found = (top, top_rows, -bottom, bottom_rows)
        return tuple(torch.from_numpy(x).to(queries.device) for x in found)

    return scan


# ----------------------------------------------------------------------------------------------- packing


def torch_pack(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """The codes and scales of rapidin.ops.pack in torch's float32; planes of whole rows, not of 64 bytes."""
    x = x.float()
    squares = x.square().sum(1)
    if dtype == "int8":
        values = (x * (127 / x.abs().amax(1, keepdim=True))).round()
        return values.to(torch.int8), squares / (x * values).sum(1)
    planes = NUMBERS[dtype]
    if dtype == "sign":
        levels = (x >= 0).to(torch.uint8)
        scale = squares / x.abs().sum(1)
    else:
        step = 0.3352 * x.square().mean(1, keepdim=True).sqrt()
        floors = (x / step).floor().clamp_(-8, 7)
        levels = (floors + 8).to(torch.uint8)
        scale = squares / (x * (floors + 0.5)).sum(1)
    split = levels.unflatten(1, (planes, -1))
    codes = split[:, 0].clone()
    for plane in range(1, planes):
        codes |= split[:, plane] << (plane * 8 // planes)
    return codes, scale


def torch_rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Signs, then the Hadamard transform of the last axis, in torch; x: [n, blocks, width]."""
    shape, width = x.shape, x.shape[-1]
    x = (x * signs).view(-1, width) / math.sqrt(width)
    half = 1
    while half < width:
        pairs = x.view(len(x), -1, 2, half)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((left + right, left - right), 2).view(-1, width)
        half *= 2
    return x.view(shape)
