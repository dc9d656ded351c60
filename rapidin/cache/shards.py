"""Shards: safetensors files with the rows of a cache, written whole, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rapidin.cache.codec import Basis, Code, Shape
from rapidin.cache.manifest import BASIS, MOST_HEADER, PRECONDITIONER, Packing, Shard
from rapidin.errors import UserError, short
from rapidin.files import own_size, read_own, reason, replace_file

_T = TypeVar("_T")


@dataclass
class Rows:
    """Rows of a cache.

    code: the tensors in which the sketches are kept (`rapidin.cache.codec`); index: [n] int64, line number in
    the data; status: [n] uint8, 0 where the row counts; truncated: [n] uint8; record: [n] int64, the first 8
    bytes of the SHA-256 of the example.
    """

    code: dict[str, Tensor]
    index: Tensor
    status: Tensor
    truncated: Tensor
    record: Tensor

    def joined(self, later: Rows) -> Rows:
        """These rows, and then the later ones."""
        return Rows(
            code={name: torch.cat([value, later.code[name]]) for name, value in self.code.items()},
            **{name: torch.cat([getattr(self, name), getattr(later, name)]) for name in _BESIDES},
        )


_BESIDES = {
    "index": torch.int64,
    "status": torch.uint8,
    "truncated": torch.uint8,
    "record": torch.int64,
}

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of a row of each tensor

_NAMES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}


def grown(path: Path) -> Path:
    """Where a shard lies that took the place of one with fewer rows, until the manifest knows of it."""
    return path.with_name(f"grown-{path.name}")


def shard_path(folder: Path, shard: Shard) -> Path:
    """The file of a shard: under its name, or where it still waits for it."""
    path = folder / shard.file
    later = grown(path)
    return later if own_size(path) != shard.bytes and own_size(later) == shard.bytes else path


def size_problem(folder: Path, shard: Shard) -> str | None:
    """In words, why a shard's file cannot be the one that was written, None where it can, without reading
    it."""
    path = shard_path(folder, shard)
    size = own_size(path)
    if isinstance(size, str):
        return f"the shard '{path}' {size}"
    return (
        None if size == shard.bytes else f"the shard '{path}' has {size:,} bytes instead of {shard.bytes:,}"
    )


class Headers:
    """Holds the headers of shards against what they must say, without reading their rows."""

    def __init__(self, fields: Fields) -> None:
        self._fields = dict(fields) | {name: (dtype, ()) for name, dtype in _BESIDES.items()}
        self._good: dict[int, bytes] = {}  # by the number of rows: shards of as many have the same header

    def problem(self, folder: Path, shard: Shard) -> str | None:
        """In words, what is wrong with a shard's header, None where nothing is."""
        path = shard_path(folder, shard)
        good = self._good.get(shard.rows, b"")
        try:
            with open(path, "rb") as file:
                found = file.read(len(good) or 8)
                if good and found == good:
                    return None
                length = int.from_bytes(found[:8], "little")
                if length > MOST_HEADER:
                    return f"the shard '{path}' is damaged: a header of {length:,} bytes"
                file.seek(0)
                found = file.read(8 + length)
            says = json.loads(found[8:])
            start, spans = 8 + length, []
            for name, (dtype, shape) in self._fields.items():
                each, wanted = says[name], [shard.rows, *shape]
                begin, end = each["data_offsets"]
                if each["dtype"] != _NAMES[dtype] or each["shape"] != wanted:
                    return f"the shard '{path}' is damaged: '{name}' has another shape or dtype"
                if end - begin != dtype.itemsize * prod(wanted):
                    return f"the shard '{path}' is damaged: '{name}' has another size"
                spans.append((begin, end))
            spans.sort()
            edges = [(0, 0), *spans, (shard.bytes - start, 0)]
            if any(before[1] != after[0] for before, after in pairwise(edges)):
                return f"the shard '{path}' is damaged: its tensors do not lie side by side"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"the shard '{path}' is damaged: its header, {type(error).__name__} {short(error)}"
        except OSError as error:
            return f"cannot read '{path}': {reason(error)}"
        self._good[shard.rows] = found
        return None


def write_shard(
    folder: Path, name: str, first: int, rows: Rows, counts: dict[str, int], *, beside: bool = False
) -> Shard:
    """Write a shard file; it is on disk under its name when this returns. UserError where it cannot be.

    beside: under the name of `grown`, since one with fewer rows is still needed.
    """
    from safetensors.torch import save

    data = save(
        {name: value.contiguous() for name, value in rows.code.items()}
        | {name: getattr(rows, name).contiguous() for name in _BESIDES}
    )
    path = folder / name
    replace_file(grown(path) if beside else path, data)
    return Shard(name, first, len(rows.index), len(data), hashlib.sha256(data).hexdigest(), counts)


def read_shard(folder: Path, shard: Shard, code: Code) -> Rows:
    """The rows of a shard as views of the memory-mapped file; UserError where that is not as it must be."""
    from safetensors import SafetensorError, safe_open

    problem = size_problem(folder, shard) or Headers(code.fields()).problem(folder, shard)
    if problem:
        raise UserError(problem, _REMEDY)
    path = shard_path(folder, shard)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in (*code.fields(), *_BESIDES)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the shard '{path}' is damaged: {error}", _REMEDY) from None
    return Rows(code={name: found.pop(name) for name in code.fields()}, **found)


def _read_tensors(
    path: Path, name: str, remedy: str, size: int, sha256: str, make: Callable[[dict[str, Tensor]], _T]
) -> _T:
    """What `make` makes of a safetensors file whose size and checksum are known; UserError where it is
    another."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_own(path, name, remedy, most=size, size=size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"the {name} '{path}' is altered: its checksum is not the manifest's", remedy)
    try:
        return make(load(data))
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the {name} '{path}' is damaged: {error}", remedy) from None


def read_basis(folder: Path, packing: Packing, width: int) -> Basis:
    """The basis that a code learnt; UserError where the file is not as the manifest says."""
    assert packing.file is not None
    return _read_tensors(
        folder / packing.file,
        "basis",
        "without it the cache cannot be read: restore it, or cache again",
        packing.bytes,
        packing.sha256,
        lambda found: Basis.of_tensors(found, packing.shape, width),
    )


def write_basis(folder: Path, basis: Basis, shape: Shape, statistics: dict[str, float]) -> Packing:
    """Write what a code learnt; it is on disk under its name when this returns."""
    from safetensors.torch import save

    data = save({name: value.contiguous() for name, value in basis.tensors().items()})
    replace_file(folder / BASIS, data)
    return Packing(shape, BASIS, len(data), hashlib.sha256(data).hexdigest(), statistics)


def read_preconditioner(
    folder: Path, record: Mapping[str, Any], make: Callable[[dict[str, Tensor]], _T]
) -> _T:
    """What `make` makes of the tensors of a cache's preconditioner; UserError where the file is not as the
    manifest's record says, or `make` raises ValueError, KeyError or TypeError."""
    path = folder / record["file"]
    again = "run the same 'rapidin cache' again: it is made anew"
    if not os.path.lexists(path):
        raise UserError(f"the preconditioner '{path}' is missing", again)
    return _read_tensors(
        path, "preconditioner", f"delete that file and {again}", record["bytes"], record["sha256"], make
    )


def write_preconditioner(folder: Path, data: bytes) -> dict[str, Any]:
    """Write a preconditioner's file; it is on disk when this returns. What the manifest says of the file."""
    replace_file(folder / PRECONDITIONER, data)
    return {"file": PRECONDITIONER, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


_REMEDY = "delete that file and run the same 'rapidin cache' again: only it is made anew"


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces; UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {reason(error)}") from None
    return digest.hexdigest()
