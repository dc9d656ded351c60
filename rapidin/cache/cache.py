"""Open, read and verify a cache; write one, and go on where a writer stopped."""

from __future__ import annotations

import fcntl
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from rapidin.cache.manifest import NAME, Manifest, Shard, shard_name
from rapidin.cache.shards import Rows, checksum, read_shard, write_shard
from rapidin.errors import UserError
from rapidin.layers import Block

_LOCK = ".lock"


class Cache:
    """A finished or growing cache on disk, read through memory maps.

    >>> cache = Cache("cache")
    >>> len(cache), cache.manifest.dim, cache.layers[0].name
    >>> cache.sketches([3, 5])          # [2, dim] float32, each block of length 1
    >>> cache.lengths([3, 5])           # [2, blocks] float32

    Raises UserError where the folder is no cache, its manifest is damaged, or a shard has another size than
    it must.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._rows: dict[int, Rows] = {}
        for shard in self.manifest.shards:
            problem = _size_problem(self.path, shard)
            if problem:
                raise UserError(problem, "'rapidin verify' checks all of it")

    def __len__(self) -> int:
        """Examples cached, those without a sketch included."""
        return self.manifest.rows_done

    @property
    def layers(self) -> list[Block]:
        """The layer table."""
        return self.manifest.layers

    def shards(self) -> Iterator[tuple[int, Rows]]:
        """(first row, rows) of each finished shard, as views of the memory map.

        Rows are counted through the whole data: an unfinished cache may have gaps.
        """
        for n, shard in enumerate(self.manifest.shards):
            if n not in self._rows:
                self._rows[n] = read_shard(self.path, shard, self.manifest)
            yield shard.first, self._rows[n]

    def _gather(self, rows: list[int] | None, field: str) -> Tensor:
        starts, parts = [], []
        for first, part in self.shards():
            starts.append(first)
            parts.append(getattr(part, field))
        if not parts:
            raise UserError(
                f"the cache in '{self.path}' holds no examples yet", "run the same 'rapidin cache' again"
            )
        if rows is None:
            return torch.cat(parts)
        found = []
        for row in rows:
            n = bisect_right(starts, row) - 1
            if n < 0 or row - starts[n] >= len(parts[n]):
                raise IndexError(f"row {row} is not in the cache ({len(self)} of {self.manifest.rows} are)")
            found.append(parts[n][row - starts[n]])
        return torch.stack(found)

    def sketches(self, rows: list[int] | None = None) -> Tensor:
        """Sketches of these rows, or all: [n, dim] float32, each block scaled to length 1."""
        return self._gather(rows, "sketch").float()

    def lengths(self, rows: list[int] | None = None) -> Tensor:
        """Lengths of the blocks before scaling: [n, blocks] float32."""
        return self._gather(rows, "length")

    def index(self, rows: list[int] | None = None) -> Tensor:
        """Line number in the data of each row: [n] int64."""
        return self._gather(rows, "index")

    def status(self, rows: list[int] | None = None) -> Tensor:
        """0 where a row counts, else why not (`rapidin.encoding.Status`): [n] uint8."""
        return self._gather(rows, "status")

    def records(self, rows: list[int] | None = None) -> Tensor:
        """First 8 bytes of the SHA-256 of each row's example: [n] int64."""
        return self._gather(rows, "record")

    @property
    def bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def info(self) -> dict[str, Any]:
        """What a person asks first."""
        m = self.manifest
        return {
            "path": str(self.path.resolve()),
            "complete": m.complete,
            "rows": len(self),
            "rows_wanted": m.rows,
            "counts": m.counts,
            "dim": m.dim,
            "layers": len(m.layers),
            "dtype": m.dtype,
            "bytes": self.bytes,
            "bytes_per_example": self.bytes / len(self) if len(self) else None,
            "shards": len(m.shards),
            **{key: getattr(m, key) for key in ("model", "sketch", "gradient", "text", "data")},
        }

    @staticmethod
    def verify(path: str | Path, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte of a cache and compare checksums; what is wrong, a line each.

        on_progress(bytes read, bytes in all). Raises UserError where there is no readable manifest.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        problems = []
        done, total = 0, sum(shard.bytes for shard in manifest.shards)
        for shard in manifest.shards:
            problem = _size_problem(folder, shard)
            if problem is None and checksum(folder / shard.file) != shard.sha256:
                problem = f"the shard '{folder / shard.file}' is altered: its checksum is not the manifest's"
            if problem is None:
                try:
                    read_shard(folder, shard, manifest)
                except UserError as error:
                    problem = error.what
            if problem:
                problems.append(problem)
            done += shard.bytes
            if on_progress:
                on_progress(done, total)
        return problems


def _size_problem(folder: Path, shard: Shard) -> str | None:
    path = folder / shard.file
    if not path.is_file():
        return f"the shard '{path}' is missing"
    size = path.stat().st_size
    return (
        None if size == shard.bytes else f"the shard '{path}' has {size:,} bytes instead of {shard.bytes:,}"
    )


class CacheWriter:
    """Writes shards into a folder, one writer at a time; goes on where an earlier one stopped.

    >>> with CacheWriter(folder, manifest) as writer:
    ...     for n in writer.missing:
    ...         writer.write(n, rows, counts)

    Raises UserError where the folder holds something else or a cache that is not the one `manifest`
    describes, where another process writes it, or where the disk is too small.
    """

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(_LOCK))
            if others and not (self.folder / NAME).exists() and others != [NAME + ".partial"]:
                raise UserError(
                    f"the folder '{self.folder}' holds something else ('{others[0]}') and no cache",
                    "name another folder",
                )
            self._lock = open(self.folder / _LOCK, "w")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise UserError(f"cannot write into '{self.folder}': {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"another process is writing the cache in '{self.folder}'") from None
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        if (self.folder / NAME).exists():
            found = Manifest.read(self.folder)
            found.refuse_unless_same(self.manifest, self.folder)
            found.data = self.manifest.data
            found.model = self.manifest.model
            found.shards = [shard for shard in found.shards if _size_problem(self.folder, shard) is None]
            self.manifest = found
        needed = sum(self.manifest.rows_of(n) for n in self.missing) * self.manifest.row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the cache needs {needed / 1e6:,.1f} MB and '{self.folder}' has {free / 1e6:,.1f} MB free",
                "name a folder on a larger disk, or lower --width",
            )
        self.manifest.write(self.folder)

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards still to be written."""
        done = {shard.first // self.manifest.shard_rows for shard in self.manifest.shards}
        return [n for n in range(self.manifest.shards_in_all) if n not in done]

    def write(self, n: int, rows: Rows, counts: dict[str, int]) -> None:
        """Write shard n and record it in the manifest; both are on disk when this returns."""
        shard = write_shard(self.folder, shard_name(n), n * self.manifest.shard_rows, rows, counts)
        self.manifest.shards = sorted([*self.manifest.shards, shard], key=lambda s: s.first)
        self.manifest.write(self.folder)

    def close(self) -> None:
        """Let another writer in."""
        self._lock.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
