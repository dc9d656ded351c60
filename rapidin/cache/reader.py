"""Open, read and verify a cache."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapidin.cache.codec import Codec
from rapidin.cache.differences import gradient_settings, preconditioner_words
from rapidin.cache.layout import Block
from rapidin.cache.learned_files import codec_of, read_preconditioner, shard_specs
from rapidin.cache.manifest import Manifest, Shard
from rapidin.cache.names import DECOYS, MANIFEST
from rapidin.cache.shards import (
    HeaderCheck,
    Rows,
    checksum_problem,
    read_shard,
    refuse_altered,
    shard_path,
    size_problem,
)
from rapidin.data.examples import Examples
from rapidin.errors import UserError

_AHEAD = 2  # shards whose bytes are compared while one is used


class Cache:
    """A finished or growing cache on disk, read through memory maps.

    >>> cache = Cache("cache")
    >>> len(cache), cache.manifest.dim, cache.layers[0].name
    >>> cache.sketches([3, 5])          # [2, dim] float32, each block of length 1
    >>> cache.lengths([3, 5])           # [2, blocks] float32
    >>> cache.codec                     # how rows are stored: `rapidin.cache.codec`

    resident: whether rows may stay on the GPU after a scan, for the next one, if there is room. compared:
    whether the bytes of a shard are compared with its checksum when it is first read in this process.
    examples: the training data, if they were in memory when this process cached them; None otherwise.

    Raises UserError if the folder is not a cache, its manifest is damaged, or a shard has another size or
    other tensors than it must. The contents of the tensors are read when they are needed, and a shard is
    refused then if its bytes are not those that were written.
    """

    def __init__(self, path: str | Path, *, resident: bool = True, compared: bool = True) -> None:
        self.path = Path(path)
        self.resident, self.compared = resident, compared
        self.examples: Examples | None = None
        self.manifest = Manifest.read(self.path)
        self._rows: dict[int, Rows] = {}
        headers = HeaderCheck(shard_specs(self.manifest)) if self.manifest.shards else None
        for shard in self.manifest.shards:
            problem = size_problem(self.path, shard) or (headers and headers.problem(self.path, shard))
            if problem:
                raise UserError(problem, "'rapidin verify' checks the whole cache")

    def __repr__(self) -> str:
        m = self.manifest
        rows = f"{len(self):,} examples" if m.complete else f"{len(self):,} of {m.rows:,} examples"
        size = f"{len(m.layers):,} layers x {m.width:,} dimensions in {m.codec.dtype}"
        return f"Cache('{self.path}': {rows}, {size}, {self.bytes / 1e6:,.1f} MB)"

    @cached_property
    def codec(self) -> Codec:
        """How the rows are stored. Raises UserError if the basis is missing or damaged."""
        return codec_of(self.manifest, self.path)

    @cached_property
    def decoys(self) -> Cache | None:
        """The cache of the texts that were never trained on (`rapidin cache --decoys`), which is inside of
        this one; None without any.

        Raises UserError if it is damaged, or was made with another model or other settings than this cache.
        """
        folder = decoys_folder(self.path)
        if folder is None:
            return None
        # Not kept on a GPU: they are few, and must not take the place of rows.
        decoys = Cache(folder, resident=False, compared=self.compared)
        if _how_made(decoys.manifest) != _how_made(self.manifest):
            raise UserError(
                f"the decoys in '{folder}' were not made as the rows of the cache were",
                "delete that folder, and run 'rapidin cache' again with `decoys`",
            )
        return decoys

    def __len__(self) -> int:
        """Examples cached, those without a sketch included."""
        return self.manifest.rows_done

    @property
    def layers(self) -> list[Block]:
        """The layer table."""
        return self.manifest.layers

    def table_rows(self, bytes_each: int) -> int:
        """Rows of a table with `bytes_each` bytes for each example up to the last that is cached.

        Raises UserError if this machine does not have the memory for it.
        """
        last = self.manifest.shards[-1] if self.manifest.shards else None
        rows = 0 if last is None else last.first + last.rows
        memory = _memory()
        if rows * bytes_each > memory > 0:
            raise UserError(
                f"a table of {rows:,} examples takes {rows * bytes_each / 1e9:,.1f} GB, "
                f"and this machine has {memory / 1e9:,.1f} GB of memory"
            )
        return rows

    def shards(
        self, *, ahead: bool = False, within: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, Rows]]:
        """(first row, rows) of each finished shard, as views of the memory map.

        Rows are numbered through the whole data: an unfinished cache may have gaps. ahead: ask the system to
        read the next two shards while one is used, for caches that are not in memory. within: only shards
        with a row in the half-open range.
        """
        chosen = list(enumerate(self.manifest.shards))
        if within is not None:
            low, high = within
            chosen = [(n, s) for n, s in chosen if s.first < high and s.first + s.rows > low]
        opened = all(n in self._rows for n, _ in chosen) and self.bytes < _memory() // 2
        if not ahead or opened:  # what was read, and is small, is in memory
            yield from ((shard.first, self._shard(n)) for n, shard in chosen)
            return
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="rapidin-checksums") as pool:
            opening = deque(pool.submit(self._shard, n) for n, _ in chosen[:_AHEAD])
            for i, (_, shard) in enumerate(chosen):
                for _, later in chosen[i + 1 : i + 3] if i else chosen[:3]:
                    _read_ahead(shard_path(self.path, later))
                rows = opening.popleft().result()
                if i + _AHEAD < len(chosen):
                    opening.append(pool.submit(self._shard, chosen[i + _AHEAD][0]))
                yield shard.first, rows

    def _shard(self, n: int) -> Rows:
        """The rows of the n-th finished shard, whose bytes are compared when it is first read."""
        if n not in self._rows:
            shard = self.manifest.shards[n]
            if self.compared:
                refuse_altered(self.path, shard)
            self._rows[n] = read_shard(self.path, shard, self.codec)
        return self._rows[n]

    def _locate(self, rows: list[int] | None) -> Iterator[tuple[Rows, list[int] | slice]]:
        """The shards of these rows, in their order, and the rows' positions in them."""
        shards = self.manifest.shards
        if not shards:
            raise UserError(
                f"the cache in '{self.path}' holds no examples yet", "run the same 'rapidin cache' again"
            )
        if rows is None:
            for n in range(len(shards)):
                yield self._shard(n), slice(None)
            return
        for row in rows:
            n = bisect_right(shards, row, key=lambda shard: shard.first) - 1
            if n < 0 or row - shards[n].first >= shards[n].rows:
                raise IndexError(f"row {row} is not in the cache ({len(self)} of {self.manifest.rows} are)")
            yield self._shard(n), [row - shards[n].first]

    def _column(self, rows: list[int] | None, name: str) -> Tensor:
        return torch.cat([getattr(shard, name)[at] for shard, at in self._locate(rows)])

    def _tensors(self, rows: list[int] | None) -> Iterator[dict[str, Tensor]]:
        for shard, at in self._locate(rows):
            yield {name: value[at] for name, value in shard.tensors.items()}

    def sketches(self, rows: list[int] | None = None) -> Tensor:
        """Sketches of these rows, or all: [n, dim] float32, each block scaled to length 1.

        Those of packed rows are as the codec decodes them.
        """
        return torch.cat([self.codec.decode(tensors).flatten(1) for tensors in self._tensors(rows)])

    def lengths(self, rows: list[int] | None = None) -> Tensor:
        """Lengths of the blocks before scaling: [n, blocks] float32."""
        return torch.cat([self.codec.lengths(tensors) for tensors in self._tensors(rows)])

    def index(self, rows: list[int] | None = None) -> Tensor:
        """Line number in the data of each row: [n] int64."""
        return self._column(rows, "index")

    def status(self, rows: list[int] | None = None) -> Tensor:
        """0 if a row counts, else why not (`rapidin.data.encoding.Status`): [n] uint8."""
        return self._column(rows, "status")

    def records(self, rows: list[int] | None = None) -> Tensor:
        """First 8 bytes of the SHA-256 of each row's example: [n] int64."""
        return self._column(rows, "record")

    @property
    def bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def info(self) -> dict[str, Any]:
        """A summary of the cache as JSON values."""
        m = self.manifest
        return {
            "path": str(self.path.resolve()),
            "complete": m.complete,
            "rows": len(self),
            "rows_wanted": m.rows,
            "counts": m.counts,
            "dim": m.dim,
            "layers": len(m.layers),
            "dtype": m.codec.dtype,
            "codec": m.codec.to_json(),
            "fitted_codec": None if m.fitted_codec is None else m.fitted_codec.to_json(),
            "preconditioner": preconditioner_words(m.gradient.get("preconditioner", "off")),
            "null": {of: max(map(len, best.values()), default=0) for of, best in (m.null or {}).items()},
            "decoys": None if self.decoys is None else self.decoys.manifest.counts.get("ok", 0),
            "bytes": self.bytes,
            "bytes_per_example": self.bytes / len(self) if len(self) else None,
            "shards": len(m.shards),
            **{key: getattr(m, key) for key in ("model", "sketch", "gradient", "text", "data")},
        }

    @staticmethod
    def verify(path: str | Path, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte of a cache and compare checksums; gives the problems, a line each.

        The decoys inside of a cache are part of it. on_progress(bytes read, bytes in all). Raises UserError
        if there is no readable manifest.
        """
        decoys = decoys_folder(Path(path))
        read = {
            folder: Manifest.read(folder) for folder in (Path(path), *([] if decoys is None else [decoys]))
        }
        total = sum(shard.bytes for manifest in read.values() for shard in manifest.shards)
        problems: list[str] = []
        done = 0
        for folder, manifest in read.items():

            def report(read_now: int, before: int = done) -> None:
                if on_progress:
                    on_progress(before + read_now, total)

            problems += _problems(folder, manifest, report)
            done += sum(shard.bytes for shard in manifest.shards)
        return problems


def decoys_folder(folder: Path) -> Path | None:
    """The folder of the decoys of the cache in `folder`, None if it has none. Raises UserError for a link."""
    decoys = folder / DECOYS
    if decoys.is_symlink():
        raise UserError(f"'{decoys}' is a link, and links are not followed", "put the folder itself there")
    return decoys if os.path.lexists(decoys / MANIFEST) else None


def _how_made(manifest: Manifest) -> list[Any]:
    """What the decoys of a cache have in common with its rows."""
    codec = manifest.codec
    return [
        manifest.model["identity"],
        manifest.sketch,
        gradient_settings(manifest.gradient),
        (manifest.preconditioner or {}).get("sha256"),
        manifest.text,
        manifest.layers,
        (codec.dtype, codec.bytes),
        manifest.fitted_codec,
    ]


def _problems(folder: Path, manifest: Manifest, on_progress: Callable[[int], None]) -> list[str]:
    """What is wrong with one cache when every byte is read, a line each; on_progress(bytes read)."""
    problems = []
    record = manifest.preconditioner
    if record is not None and record["sha256"] is not None:
        try:
            read_preconditioner(folder, record, dict)
        except UserError as error:
            problems.append(error.what)
    try:
        codec = codec_of(manifest, folder)
    except UserError as error:
        return [*problems, error.what]
    done = 0
    for shard in manifest.shards:
        problem = _shard_problem(folder, shard, codec)
        if problem:
            problems.append(problem)
        done += shard.bytes
        on_progress(done)
    return problems


def _shard_problem(folder: Path, shard: Shard, codec: Codec) -> str | None:
    """What is wrong with a shard, in words, when all of it is read; None if nothing is."""
    problem = size_problem(folder, shard) or checksum_problem(folder, shard)
    if problem is None:
        try:
            refuse_altered(folder, shard)
            read_shard(folder, shard, codec)
        except UserError as error:
            return error.what
    return problem


def _memory() -> int:
    """Bytes of this machine's memory; 0 on systems that do not say, such as Windows."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_ahead(path: Path) -> None:
    """Ask the system to read a file into memory. It is a hint, which some systems do not know."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
