"""Shards: safetensors files with the rows of a cache, written whole, read through a memory map."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rapidin.cache.manifest import Manifest, Shard, replace_file
from rapidin.errors import UserError


@dataclass
class Rows:
    """Rows of a cache.

    sketch: [n, dim] float16 or float32, each block scaled to length 1 (or all zeros); length: [n, blocks]
    float32, each block's length before that; index: [n] int64, line number in the data; status: [n] uint8, 0
    where the row counts; truncated: [n] uint8; record: [n] int64, the first 8 bytes of the SHA-256 of the
    example.
    """

    sketch: Tensor
    length: Tensor
    index: Tensor
    status: Tensor
    truncated: Tensor
    record: Tensor


_FIELDS = ("sketch", "length", "index", "status", "truncated", "record")


def _expected(manifest: Manifest, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "sketch": (torch.float16 if manifest.dtype == "float16" else torch.float32, (rows, manifest.dim)),
        "length": (torch.float32, (rows, len(manifest.layers))),
        "index": (torch.int64, (rows,)),
        "status": (torch.uint8, (rows,)),
        "truncated": (torch.uint8, (rows,)),
        "record": (torch.int64, (rows,)),
    }


def write_shard(folder: Path, name: str, first: int, rows: Rows, counts: dict[str, int]) -> Shard:
    """Write a shard file; it is on disk under its name when this returns. UserError where it cannot be."""
    from safetensors.torch import save

    data = save({name: getattr(rows, name).contiguous() for name in _FIELDS})
    replace_file(folder / name, data)
    return Shard(name, first, len(rows.index), len(data), hashlib.sha256(data).hexdigest(), counts)


def read_shard(folder: Path, shard: Shard, manifest: Manifest) -> Rows:
    """The rows of a shard as views of the memory-mapped file; UserError where that is not as it must be."""
    from safetensors import SafetensorError, safe_open

    path = folder / shard.file
    if not path.is_file():
        raise UserError(
            f"the shard '{path}' is missing", "run the same 'rapidin cache' again: only it is made anew"
        )
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(f"the shard '{path}' has {size:,} bytes instead of {shard.bytes:,}", _REMEDY)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in _FIELDS}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the shard '{path}' is damaged: {error}", _REMEDY) from None
    for name, (dtype, shape) in _expected(manifest, shard.rows).items():
        if found[name].dtype != dtype or tuple(found[name].shape) != shape:
            raise UserError(f"the shard '{path}' is damaged: '{name}' has another shape or dtype", _REMEDY)
    return Rows(**found)


_REMEDY = "delete that file and run the same 'rapidin cache' again: only it is made anew"


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces; UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None
    return digest.hexdigest()
