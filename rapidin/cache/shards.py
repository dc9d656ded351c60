"""Shards: safetensors files with the rows of a cache, written whole, read through a memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.cache.manifest import GEOMETRY, Packing, Shard, replace_file
from rapidin.errors import UserError
from rapidin.pack import Basis, Code, Shape

BASIS = "basis.safetensors"


@dataclass
class Rows:
    """Rows of a cache.

    code: the tensors in which the sketches are kept (`rapidin.pack`); index: [n] int64, line number in the
    data; status: [n] uint8, 0 where the row counts; truncated: [n] uint8; record: [n] int64, the first 8
    bytes of the SHA-256 of the example.
    """

    code: dict[str, Tensor]
    index: Tensor
    status: Tensor
    truncated: Tensor
    record: Tensor


_BESIDES = {
    "index": torch.int64,
    "status": torch.uint8,
    "truncated": torch.uint8,
    "record": torch.int64,
}


def write_shard(folder: Path, name: str, first: int, rows: Rows, counts: dict[str, int]) -> Shard:
    """Write a shard file; it is on disk under its name when this returns. UserError where it cannot be."""
    from safetensors.torch import save

    data = save(
        {name: value.contiguous() for name, value in rows.code.items()}
        | {name: getattr(rows, name).contiguous() for name in _BESIDES}
    )
    replace_file(folder / name, data)
    return Shard(name, first, len(rows.index), len(data), hashlib.sha256(data).hexdigest(), counts)


def read_shard(folder: Path, shard: Shard, code: Code) -> Rows:
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
            found = {name: file.get_tensor(name) for name in (*code.fields(), *_BESIDES)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the shard '{path}' is damaged: {error}", _REMEDY) from None
    expected = code.fields() | {name: (dtype, ()) for name, dtype in _BESIDES.items()}
    for name, (dtype, shape) in expected.items():
        if found[name].dtype != dtype or tuple(found[name].shape) != (shard.rows, *shape):
            raise UserError(f"the shard '{path}' is damaged: '{name}' has another shape or dtype", _REMEDY)
    return Rows(code={name: found.pop(name) for name in code.fields()}, **found)


def read_basis(folder: Path, packing: Packing, width: int) -> Basis:
    """The basis that a code learnt; UserError where the file is not as the manifest says."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert packing.file is not None
    path = folder / packing.file
    remedy = "without it the cache cannot be read: restore it, or cache again"
    if not path.is_file():
        raise UserError(f"the basis '{path}' is missing", remedy)
    if path.stat().st_size != packing.bytes:
        raise UserError(f"the basis '{path}' has another size than the manifest says", remedy)
    try:
        return Basis.of_tensors(load_file(path), packing.shape, width)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the basis '{path}' is damaged: {error}", remedy) from None


def write_basis(folder: Path, basis: Basis, shape: Shape, statistics: dict[str, float]) -> Packing:
    """Write what a code learnt; it is on disk under its name when this returns."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in basis.tensors().items()})
    replace_file(folder / BASIS, data)
    return Packing(shape, BASIS, len(data), hashlib.sha256(data).hexdigest(), statistics)


def read_geometry(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a cache's geometry; UserError where the file is not as the manifest's record says."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / record["file"]
    again = "run the same 'rapidin cache' again: it is made anew"
    remedy = f"delete that file and {again}"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"the geometry '{path}' is missing", again) from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise UserError(f"the geometry '{path}' is altered: its checksum is not the manifest's", remedy)
    try:
        tensors: dict[str, Tensor] = load(data)
        return tensors
    except (SafetensorError, ValueError) as error:
        raise UserError(f"the geometry '{path}' is damaged: {error}", remedy) from None


def write_geometry(folder: Path, data: bytes) -> dict[str, Any]:
    """Write a geometry's file; it is on disk when this returns. What the manifest says of the file."""
    replace_file(folder / GEOMETRY, data)
    return {"file": GEOMETRY, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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
