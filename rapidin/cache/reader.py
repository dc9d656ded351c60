"""Open, read and verify a cache; write one, and go on where a writer stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rapidin.cache import receipts
from rapidin.cache.codec import FLOATS, Basis, Code, FloatCode, PackedCode, Shape
from rapidin.cache.layout import Block
from rapidin.cache.manifest import NAME, Manifest, Packing, Shard, preconditioner_words, shard_name
from rapidin.cache.shards import (
    Fields,
    Headers,
    Rows,
    checksum,
    grown,
    read_basis,
    read_preconditioner,
    read_shard,
    shard_path,
    size_problem,
    write_basis,
    write_preconditioner,
    write_shard,
)
from rapidin.errors import UserError
from rapidin.files import LOCK, PARTIAL, lock_folder, own_size, reason, remove_partials

if TYPE_CHECKING:
    from typing_extensions import Self

_SAMPLE = "sample"


class Cache:
    """A finished or growing cache on disk, read through memory maps.

    >>> cache = Cache("cache")
    >>> len(cache), cache.manifest.dim, cache.layers[0].name
    >>> cache.sketches([3, 5])          # [2, dim] float32, each block of length 1
    >>> cache.lengths([3, 5])           # [2, blocks] float32
    >>> cache.code                      # how rows are kept: `rapidin.cache.codec`

    resident: whether rows may stay on the GPU after a scan, for the next one, if there is room.

    Raises UserError where the folder is no cache, its manifest is damaged, or a shard has another size or
    other tensors than it must; what the tensors hold is not read before it is needed.
    """

    def __init__(self, path: str | Path, *, resident: bool = True) -> None:
        self.path = Path(path)
        self.resident = resident
        self.manifest = Manifest.read(self.path)
        self._rows: dict[int, Rows] = {}
        headers = Headers(_fields(self.manifest)) if self.manifest.shards else None
        for shard in self.manifest.shards:
            problem = size_problem(self.path, shard) or (headers and headers.problem(self.path, shard))
            if problem:
                raise UserError(problem, "'rapidin verify' checks all of it")

    @cached_property
    def code(self) -> Code:
        """How the rows are kept. UserError where what it learnt is missing or damaged."""
        return code_of(self.manifest, self.path)

    def __len__(self) -> int:
        """Examples cached, those without a sketch included."""
        return self.manifest.rows_done

    @property
    def layers(self) -> list[Block]:
        """The layer table."""
        return self.manifest.layers

    def table_rows(self, bytes_each: int) -> int:
        """Rows of a table with `bytes_each` bytes for each example up to the last that is cached.

        Raises UserError where this machine has no room for it.
        """
        last = self.manifest.shards[-1] if self.manifest.shards else None
        rows = 0 if last is None else last.first + last.rows
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if rows * bytes_each > has:
            raise UserError(
                f"a table of {rows:,} examples takes {rows * bytes_each / 1e9:,.1f} GB, "
                f"and this machine has {has / 1e9:,.1f} GB of memory"
            )
        return rows

    def shards(
        self, *, ahead: bool = False, within: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, Rows]]:
        """(first row, rows) of each finished shard, as views of the memory map.

        Rows are counted through the whole data: an unfinished cache may have gaps. ahead: the system is asked
        to read the shards to come while one is in hand, for caches that are not in memory. within: only
        shards with a row that is not below the first number and below the second.
        """
        chosen = list(enumerate(self.manifest.shards))
        if within is not None:
            low, high = within
            chosen = [(n, s) for n, s in chosen if s.first < high and s.first + s.rows > low]
        for place, (n, shard) in enumerate(chosen):
            if ahead:
                for _, later in chosen[place + 1 : place + 3] if place else chosen[:3]:
                    _read_ahead(shard_path(self.path, later))
            if n not in self._rows:
                self._rows[n] = read_shard(self.path, shard, self.code)
            yield shard.first, self._rows[n]

    def _parts(self, rows: list[int] | None) -> Iterator[tuple[Rows, list[int] | slice]]:
        """Where these rows lie, in their order: rows of a shard and places in it."""
        shards = list(self.shards())
        if not shards:
            raise UserError(
                f"the cache in '{self.path}' holds no examples yet", "run the same 'rapidin cache' again"
            )
        if rows is None:
            for _, part in shards:
                yield part, slice(None)
            return
        starts = [first for first, _ in shards]
        for row in rows:
            n = bisect_right(starts, row) - 1
            if n < 0 or row - starts[n] >= len(shards[n][1].index):
                raise IndexError(f"row {row} is not in the cache ({len(self)} of {self.manifest.rows} are)")
            yield shards[n][1], [row - starts[n]]

    def _gather(self, rows: list[int] | None, field: str) -> Tensor:
        return torch.cat([getattr(part, field)[where] for part, where in self._parts(rows)])

    def _codes(self, rows: list[int] | None) -> Iterator[dict[str, Tensor]]:
        for part, where in self._parts(rows):
            yield {name: value[where] for name, value in part.code.items()}

    def sketches(self, rows: list[int] | None = None) -> Tensor:
        """Sketches of these rows, or all: [n, dim] float32, each block scaled to length 1.

        Of packed rows what their code tells of it.
        """
        return torch.cat([self.code.decode(codes).flatten(1) for codes in self._codes(rows)])

    def lengths(self, rows: list[int] | None = None) -> Tensor:
        """Lengths of the blocks before scaling: [n, blocks] float32."""
        return torch.cat([self.code.lengths(codes) for codes in self._codes(rows)])

    def index(self, rows: list[int] | None = None) -> Tensor:
        """Line number in the data of each row: [n] int64."""
        return self._gather(rows, "index")

    def status(self, rows: list[int] | None = None) -> Tensor:
        """0 where a row counts, else why not (`rapidin.data.encoding.Status`): [n] uint8."""
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
            "dtype": m.code.dtype,
            "code": m.code.to_json(),
            "packing": None if m.packing is None else m.packing.to_json(),
            "preconditioner": preconditioner_words(m.gradient.get("preconditioner", "off")),
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
        record = manifest.preconditioner
        if record is not None and record["sha256"] is not None:
            try:
                read_preconditioner(folder, record, dict)
            except UserError as error:
                problems.append(error.what)
        try:
            code = code_of(manifest, folder)
        except UserError as error:
            return [*problems, error.what]
        done, total = 0, sum(shard.bytes for shard in manifest.shards)
        for shard in manifest.shards:
            problem = size_problem(folder, shard)
            if problem is None:
                problem = _altered(folder, shard)
            if problem is None:
                try:
                    read_shard(folder, shard, code)
                except UserError as error:
                    problem = error.what
            if problem:
                problems.append(problem)
            done += shard.bytes
            if on_progress:
                on_progress(done, total)
        return problems


def _read_ahead(path: Path) -> None:
    """Ask the system to read a file into memory; a hint, without effect where it is there or not
    understood."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError), open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _altered(folder: Path, shard: Shard) -> str | None:
    """In words, that a shard's checksum is not the manifest's, None where it is. Raises UserError where the
    file cannot be read."""
    path = shard_path(folder, shard)
    if checksum(path) == shard.sha256:
        return None
    return f"the shard '{path}' is altered: its checksum is not the manifest's"


def _fields(manifest: Manifest) -> Fields:
    """What a shard of this cache holds."""
    if manifest.code.dtype in FLOATS:
        return FloatCode(manifest.code.dtype, len(manifest.layers), manifest.width).fields()
    assert manifest.packing is not None
    return PackedCode(manifest.packing.shape, manifest.width, manifest.sketch["seed"]).fields()


def code_of(manifest: Manifest, folder: Path) -> Code:
    """The code of a cache; what it learnt is read from the folder."""
    blocks, width, packing = len(manifest.layers), manifest.width, manifest.packing
    if manifest.code.dtype in FLOATS:
        return FloatCode(manifest.code.dtype, blocks, width)
    if packing is None:
        raise UserError(
            f"the cache in '{folder}' holds no examples yet", "run the same 'rapidin cache' again"
        )
    basis = None if packing.file is None else read_basis(folder, packing, width)
    return PackedCode(packing.shape, width, manifest.sketch["seed"], basis)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the system refuses inside is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write into '{folder}': {reason(error)}") from None


class ShardWriter:
    """Writes shards of a cache whose manifest another process keeps, and leaves a receipt of each.

    part: (i, n) for every n-th shard from number i on, None for all.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, part: tuple[int, int] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.part = part

    @property
    def wanted(self) -> list[int]:
        """Numbers of the shards that are this writer's to write, done or not."""
        start, step = self.part or (0, 1)
        return list(range(start, self.manifest.shards_in_all, step))

    @property
    def missing(self) -> list[int]:
        """Numbers of those still to be written, or to be written in full."""
        rows_of, each = self.manifest.rows_of, self.manifest.shard_rows
        done = {s.first // each for s in self.manifest.shards if s.rows == rows_of(s.first // each)}
        return [n for n in self.wanted if n not in done]

    @property
    def sample_folder(self) -> Path:
        """Where the sketches of the sample wait until the cache is complete."""
        return self.folder / _SAMPLE

    @property
    def code(self) -> Code:
        """How rows are packed, with what it has learnt."""
        return code_of(self.manifest, self.folder)

    def write(self, n: int, rows: Rows, counts: dict[str, int]) -> None:
        """Write shard n and its receipt; both are on disk when this returns."""
        receipts.leave(self.folder, self._write(n, rows, counts))

    def _write(self, n: int, rows: Rows, counts: dict[str, int], *, beside: bool = False) -> Shard:
        first = n * self.manifest.shard_rows
        return write_shard(self.folder, shard_name(n), first, rows, counts, beside=beside)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CacheWriter(ShardWriter):
    """Writes shards into a folder and keeps its manifest, one such writer at a time; goes on where an earlier
    one stopped, and takes up what `ShardWriter`s wrote beside it.

    prefix: the identity of the first n examples, where a complete cache of those may be added to
    (`--append`): its rows are kept as they are. A shard that was not full is written anew beside the old
    one, which is replaced when the manifest knows of the new one, so that no row is ever without a file.

    >>> with CacheWriter(folder, manifest) as writer:
    ...     for n in writer.missing:
    ...         writer.write(n, rows, counts)

    Raises UserError where the folder holds something else or a cache that is not the one `manifest`
    describes, where another process writes it, or where the disk is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        prefix: Callable[[int], str] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(folder, manifest, part)
        manifest.check_size()
        with _writing(self.folder):
            if os.path.isdir(self.folder):
                self._refuse_others()
        self._lock = lock_folder(self.folder)
        try:
            with _writing(self.folder):
                self._refuse_others()
                self._go_on(prefix)
        except BaseException:
            self.close()
            raise

    def _refuse_others(self) -> None:
        """Raise UserError where the folder holds no cache but something else."""
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in (LOCK, NAME + PARTIAL))
        if others and NAME not in others:
            raise UserError(
                f"the folder '{self.folder}' holds something else ('{others[0]}') and no cache",
                "name another folder",
            )

    def _go_on(self, prefix: Callable[[int], str] | None) -> None:
        remove_partials(self.folder)
        if self.sample_folder.is_symlink():
            self.sample_folder.unlink()
        if (self.folder / NAME).exists():
            found = Manifest.read(self.folder)
            if prefix is not None and found.rows < self.manifest.rows:
                self._grow(found, prefix)
            found.refuse_unless_same(self.manifest, self.folder)
            begun = {"begun": found.data["begun"]} if "begun" in found.data else {}
            found.data = self.manifest.data | begun
            found.model = self.manifest.model
            if (
                found.packing
                and found.packing.file
                and own_size(self.folder / found.packing.file) != (found.packing.bytes)
            ):
                read_basis(self.folder, found.packing, found.width)  # says what is wrong with it
            found.shards = [shard for shard in found.shards if size_problem(self.folder, shard) is None]
            self.manifest = found
            self._settle_grown()
            self.record(receipts.found(self.folder, found, checked=True))
            receipts.forget_all(self.folder)
        needed = sum(self.manifest.rows_of(n) for n in self.missing) * self.manifest.row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the cache needs {needed / 1e6:,.1f} MB and '{self.folder}' has {free / 1e6:,.1f} MB free",
                "name a folder on a larger disk, or lower --width",
            )
        self.manifest.write(self.folder)

    def _grow(self, found: Manifest, prefix: Callable[[int], str]) -> None:
        """Make the manifest that was found one of more examples, whose first ones it holds."""
        if prefix(found.rows) != found.data.get("identity"):
            raise UserError(
                f"the first {found.rows:,} examples are not those of the cache in '{self.folder}'",
                "give --data as it was when they were cached, and the new examples after them",
            )
        if not found.complete:
            raise UserError(
                f"the cache in '{self.folder}' is unfinished: {found.rows_done:,} of {found.rows:,} examples",
                f"finish it first, with --limit {found.rows} instead of --append",
            )
        if found.code.sample or (found.preconditioner or {}).get("sample"):
            found.data["begun"] = found.rows_begun
        found.rows, found.data["identity"] = self.manifest.rows, self.manifest.data["identity"]
        shutil.rmtree(self.sample_folder, ignore_errors=True)  # of the examples before

    def _settle_grown(self) -> None:
        """Give grown shards that the manifest knows of their names, and remove those that it does not."""
        for shard in self.manifest.shards:
            path = shard_path(self.folder, shard)
            if path.name != shard.file:
                os.replace(path, self.folder / shard.file)
        for path in self.folder.glob(grown(Path("*")).name):
            path.unlink()

    def set_preconditioner(self, data: bytes) -> None:
        """Write the preconditioner's file, before any sketch is made with it."""
        record = self.manifest.preconditioner
        assert record is not None
        self.manifest.gradient["preconditioner"] = record | write_preconditioner(self.folder, data)
        self.manifest.write(self.folder)

    def set_packing(self, shape: Shape, basis: Basis | None, statistics: dict[str, float]) -> None:
        """Write what the code has learnt and how it was fitted, before any shard that it packs."""
        self.manifest.packing = (
            Packing(shape) if basis is None else write_basis(self.folder, basis, shape, statistics)
        )
        self.manifest.write(self.folder)

    def write(self, n: int, rows: Rows, counts: dict[str, int]) -> None:
        """Write the rows of shard n that are not there and record it in the manifest; both are on disk when
        this returns. Raises UserError where they cannot be, or the rows that are there are altered."""
        folder, before = self.folder, self.manifest.shard_at(n)
        if before is not None:
            problem = _altered(folder, before)
            if problem:
                raise UserError(problem, "delete that file and run the same 'rapidin cache' again")
            rows = read_shard(folder, before, self.code).joined(rows)
            both = {**before.counts, **counts}
            counts = {what: before.counts.get(what, 0) + counts.get(what, 0) for what in both}
        shard = self._write(n, rows, counts, beside=before is not None)
        self._take_up([shard])
        if before is not None:
            with _writing(folder):
                os.replace(grown(folder / shard.file), folder / shard.file)

    def take_up(self) -> None:
        """Record the shards that other processes wrote."""
        self._take_up([])

    def finish(self) -> None:
        """Leave no receipts, now that no other process writes."""
        receipts.forget_all(self.folder)

    def _take_up(self, shards: list[Shard]) -> None:
        """Record these shards and, with them, those that there are receipts of."""
        own = {shard.first for shard in shards}
        written = [s for s in receipts.found(self.folder, self.manifest) if s.first not in own]
        self.record([*shards, *written])
        receipts.forget(self.folder, written)

    def record(self, shards: list[Shard]) -> None:
        """Put shards that are on disk into the manifest, which is on disk when this returns."""
        if shards:
            new = {shard.first for shard in shards}
            others = [shard for shard in self.manifest.shards if shard.first not in new]
            self.manifest.shards = sorted([*others, *shards], key=lambda s: s.first)
            self.manifest.write(self.folder)

    def close(self) -> None:
        """Let another writer in; receipts that are left come to it as well."""
        self._lock.close()
