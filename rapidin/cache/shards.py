"""Shards: safetensors files with the rows of a cache, written whole and read through a memory map."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rapidin.cache.codec import Codec, TensorSpecs
from rapidin.cache.manifest import MAX_HEADER, Shard
from rapidin.cache.names import grown
from rapidin.errors import UserError, short
from rapidin.files import reason, regular_file_size, replace_file

_REMEDY = "delete that file and run the same 'rapidin cache' again: only that shard is made again"


@dataclass
class Rows:
    """Rows of a cache.

    tensors: those in which a codec stores the sketches (`rapidin.cache.codec`); index: [n] int64, line number
    in the data; status: [n] uint8, 0 if the row counts; truncated: [n] uint8; record: [n] int64, the first 8
    bytes of the SHA-256 of the example; zero_gradient: by range of these rows whether a block of one of them
    has zero gradient, of the ranges that were scanned.
    """

    tensors: dict[str, Tensor]
    index: Tensor
    status: Tensor
    truncated: Tensor
    record: Tensor
    zero_gradient: dict[tuple[int, int], bool] = field(default_factory=dict)

    def joined(self, later: Rows) -> Rows:
        """These rows followed by the later ones."""
        return Rows(
            tensors={name: torch.cat([value, later.tensors[name]]) for name, value in self.tensors.items()},
            index=torch.cat([self.index, later.index]),
            status=torch.cat([self.status, later.status]),
            truncated=torch.cat([self.truncated, later.truncated]),
            record=torch.cat([self.record, later.record]),
        )


# The tensors of a shard that are not the codec's.
_ROW_COLUMNS = {
    "index": torch.int64,
    "status": torch.uint8,
    "truncated": torch.uint8,
    "record": torch.int64,
}

_SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}


def shard_path(folder: Path, shard: Shard) -> Path:
    """The file of a shard: under its name, or, if that is still an older one's, under its temporary name."""
    path = folder / shard.file
    replacement = grown(path)
    if regular_file_size(path) != shard.bytes and regular_file_size(replacement) == shard.bytes:
        return replacement
    return path


def size_problem(folder: Path, shard: Shard) -> str | None:
    """Why a shard's file cannot be the one that was written, in words, by its size alone; None if it can."""
    path = shard_path(folder, shard)
    size = regular_file_size(path)
    if isinstance(size, str):
        return f"the shard '{path}' {size}"
    return (
        None if size == shard.bytes else f"the shard '{path}' has {size:,} bytes instead of {shard.bytes:,}"
    )


def checksum_problem(folder: Path, shard: Shard) -> str | None:
    """In words, that a shard's checksum is not the manifest's; None if it is. Raises UserError if the file
    cannot be read."""
    path = shard_path(folder, shard)
    if checksum(path) == shard.sha256:
        return None
    return _altered(path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {reason(error)}") from None
    return digest.hexdigest()


# Shards of which every byte was compared in this process: path, number and time of the file, and checksum.
_compared: set[tuple[str, int, int, str]] = set()


def refuse_altered(folder: Path, shard: Shard) -> None:
    """Raise UserError if a shard's bytes are not those that were written, by its fast checksum.

    A shard that has none, of an earlier version, passes, and so does a file that this process has compared
    before and that was not written since.
    """
    if shard.xxh3 is None:
        return
    import xxhash

    path, problem = shard_path(folder, shard), size_problem(folder, shard)
    if problem:
        raise UserError(problem, _REMEDY)
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            known = (str(path.absolute()), state.st_ino, state.st_mtime_ns, shard.xxh3)
            if known in _compared:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = xxhash.xxh3_64_hexdigest(data)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {error}") from None
    if found != shard.xxh3:
        raise UserError(_altered(path), _REMEDY)
    _compared.add(known)


def _altered(path: Path) -> str:
    return f"the shard '{path}' is altered: its checksum is not the manifest's"


class HeaderCheck:
    """Compares the headers of shards with the tensors that they must have, without reading their rows."""

    def __init__(self, specs: TensorSpecs) -> None:
        self._specs = dict(specs) | {name: (dtype, ()) for name, dtype in _ROW_COLUMNS.items()}
        self._valid: dict[int, bytes] = {}  # by number of rows: shards of as many have the same header

    def problem(self, folder: Path, shard: Shard) -> str | None:
        """What is wrong with a shard's header, in words; None if nothing is."""
        path = shard_path(folder, shard)
        valid = self._valid.get(shard.rows, b"")
        try:
            with open(path, "rb") as file:
                data = file.read(len(valid) or 8)
                if valid and data == valid:
                    return None
                length = int.from_bytes(data[:8], "little")
                if length > MAX_HEADER:
                    return f"the shard '{path}' is damaged: a header of {length:,} bytes"
                file.seek(0)
                data = file.read(8 + length)
            problem = self._mismatch(shard, data, shard.bytes - 8 - length)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"its header, {type(error).__name__} {short(error)}"
        except OSError as error:
            return f"cannot read '{path}': {reason(error)}"
        if problem:
            return f"the shard '{path}' is damaged: {problem}"
        self._valid[shard.rows] = data
        return None

    def _mismatch(self, shard: Shard, data: bytes, size: int) -> str | None:
        """What is wrong with a header's `data` in front of tensors of `size` bytes; None if nothing is."""
        header, spans = json.loads(data[8:]), []
        for name, (dtype, row_shape) in self._specs.items():
            entry, shape = header[name], [shard.rows, *row_shape]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != _SAFETENSORS_NAMES[dtype] or entry["shape"] != shape:
                return f"'{name}' has another shape or dtype"
            if end - begin != dtype.itemsize * prod(shape):
                return f"'{name}' has another size"
            spans.append((begin, end))
        spans.sort()
        edges = [(0, 0), *spans, (size, 0)]
        if any(before[1] != after[0] for before, after in pairwise(edges)):
            return "its tensors do not lie side by side"
        return None


def write_shard(
    folder: Path, name: str, first: int, rows: Rows, counts: dict[str, int], *, beside: bool = False
) -> Shard:
    """Write a shard file; it is on disk under its name when this returns. Raises UserError if it cannot be.

    beside: write it under the name of `grown`, since the file with fewer rows is still needed.
    """
    import xxhash
    from safetensors.torch import save

    data = save(
        {name: value.contiguous() for name, value in rows.tensors.items()}
        | {name: getattr(rows, name).contiguous() for name in _ROW_COLUMNS}
    )
    path = folder / name
    replace_file(grown(path) if beside else path, data)
    sha256, fast = hashlib.sha256(data).hexdigest(), xxhash.xxh3_64_hexdigest(data)
    return Shard(name, first, len(rows.index), len(data), sha256, counts, fast)


def read_shard(folder: Path, shard: Shard, codec: Codec) -> Rows:
    """The rows of a shard as views of the memory-mapped file. Raises UserError if the file is not valid."""
    from safetensors import SafetensorError, safe_open

    specs = codec.tensor_specs()
    problem = size_problem(folder, shard) or HeaderCheck(specs).problem(folder, shard)
    if problem:
        raise UserError(problem, _REMEDY)
    path = shard_path(folder, shard)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in (*specs, *_ROW_COLUMNS)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the shard '{path}' is damaged: {error}", _REMEDY) from None
    return Rows(
        tensors={name: tensors[name] for name in specs},
        index=tensors["index"],
        status=tensors["status"],
        truncated=tensors["truncated"],
        record=tensors["record"],
    )
