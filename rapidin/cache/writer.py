"""Write a cache, and resume where a writer stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rapidin.cache import receipts
from rapidin.cache.codec import Basis, Codec, RowShape
from rapidin.cache.learned_files import codec_of, read_basis, write_basis, write_preconditioner
from rapidin.cache.manifest import FittedCodec, Manifest, Shard
from rapidin.cache.names import FITTED, MANIFEST, SAMPLE, grown, shard_name
from rapidin.cache.shards import Rows, checksum_problem, read_shard, shard_path, size_problem, write_shard
from rapidin.errors import UserError
from rapidin.files import LOCK, PARTIAL, lock_folder, reason, regular_file_size, remove_partials

if TYPE_CHECKING:
    from typing_extensions import Self


class ShardWriter:
    """Writes shards of a cache whose manifest another process keeps, and leaves a receipt of each.

    shard_slice: (i, n) for every n-th shard from number i on, None for all.
    """

    def __init__(
        self, folder: str | Path, manifest: Manifest, shard_slice: tuple[int, int] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.shard_slice = shard_slice

    @property
    def assigned(self) -> list[int]:
        """Numbers of the shards that this writer is to write, finished or not."""
        start, step = self.shard_slice or (0, 1)
        return list(range(start, self.manifest.shards_in_all, step))

    @property
    def missing(self) -> list[int]:
        """Numbers of the assigned shards that are not finished, or lack rows."""
        rows_of, shard_rows = self.manifest.rows_of, self.manifest.shard_rows
        done = {
            s.first // shard_rows for s in self.manifest.shards if s.rows == rows_of(s.first // shard_rows)
        }
        return [n for n in self.assigned if n not in done]

    @property
    def sample_folder(self) -> Path:
        """The folder of the codec's sample's sketches until the cache is complete."""
        return self.folder / SAMPLE

    @property
    def fitted_folder(self) -> Path:
        """The folder of sketches that were made as the preconditioner was fitted, until the cache is
        complete."""
        return self.folder / FITTED

    def remove_samples(self) -> None:
        """Delete the sketches that are kept until the cache is complete."""
        for folder in (self.sample_folder, self.fitted_folder):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def codec(self) -> Codec:
        """How rows are stored, with the basis that was learned."""
        return codec_of(self.manifest, self.folder)

    def write(self, n: int, rows: Rows, counts: dict[str, int]) -> None:
        """Write shard n and its receipt; both are on disk when this returns."""
        receipts.leave(self.folder, self._write(n, rows, counts))

    def _write(self, n: int, rows: Rows, counts: dict[str, int], *, beside: bool = False) -> Shard:
        first = n * self.manifest.shard_rows
        return write_shard(self.folder, shard_name(n), first, rows, counts, beside=beside)

    def close(self) -> None:
        """Does nothing: this writer holds no lock."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CacheWriter(ShardWriter):
    """Writes shards into a folder and keeps its manifest, one such writer at a time; resumes where an earlier
    one stopped, and records what `ShardWriter`s wrote beside it.

    prefix: the identity of the first n examples, if a complete cache of those may be added to (`append`):
    its rows are kept as they are. A shard that was not full is rewritten beside the old one, which is
    replaced when the manifest records the new one, so that no row is ever without a file.

    >>> with CacheWriter(folder, manifest) as writer:
    ...     for n in writer.missing:
    ...         writer.write(n, rows, counts)

    Raises UserError if the folder holds something else or a cache that is not the one `manifest` describes,
    if another process writes it, or if the disk is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        prefix: Callable[[int], str] | None = None,
        shard_slice: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(folder, manifest, shard_slice)
        manifest.check_size()
        with _writing(self.folder):
            if os.path.isdir(self.folder):
                self._refuse_other_files()
        self._lock = lock_folder(self.folder)
        try:
            with _writing(self.folder):
                self._refuse_other_files()
                self._resume(prefix)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------ resuming

    def _refuse_other_files(self) -> None:
        """Raise UserError if the folder is not empty and has no cache."""
        others = sorted(p.name for p in self.folder.iterdir() if p.name not in (LOCK, MANIFEST + PARTIAL))
        if others and MANIFEST not in others:
            raise UserError(
                f"the folder '{self.folder}' holds something else ('{others[0]}') and no cache",
                "name another folder",
            )

    def _resume(self, prefix: Callable[[int], str] | None) -> None:
        """Take over the cache in the folder, if there is one, and check that the disk has room."""
        remove_partials(self.folder)
        for sample in (self.sample_folder, self.fitted_folder):
            if sample.is_symlink():
                sample.unlink()
        if (self.folder / MANIFEST).exists():
            self._take_over(Manifest.read(self.folder), prefix)
        needed = sum(self.manifest.rows_of(n) for n in self.missing) * self.manifest.row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the cache needs {needed / 1e6:,.1f} MB and '{self.folder}' has {free / 1e6:,.1f} MB free",
                "name a folder on a larger disk, or lower `width`",
            )
        self.manifest.write(self.folder)

    def _take_over(self, existing: Manifest, prefix: Callable[[int], str] | None) -> None:
        """Continue with the manifest that is in the folder, without the shards whose files are lost."""
        if prefix is not None and existing.rows < self.manifest.rows:
            self._grow(existing, prefix)
        existing.refuse_unless_same(self.manifest, self.folder)
        begun = {"begun": existing.data["begun"]} if "begun" in existing.data else {}
        existing.data = self.manifest.data | begun
        existing.model = self.manifest.model
        fitted = existing.fitted_codec
        if fitted and fitted.file and regular_file_size(self.folder / fitted.file) != fitted.bytes:
            read_basis(self.folder, fitted, existing.width)  # raises UserError, which says what is wrong
        existing.shards = [shard for shard in existing.shards if size_problem(self.folder, shard) is None]
        self.manifest = existing
        self._rename_grown()
        self.record(receipts.unrecorded(self.folder, existing, check=True))
        receipts.forget_all(self.folder)

    def _grow(self, existing: Manifest, prefix: Callable[[int], str]) -> None:
        """Make the existing manifest one of more examples, whose first ones it holds."""
        if prefix(existing.rows) != existing.data.get("identity"):
            raise UserError(
                f"the first {existing.rows:,} examples are not those of the cache in '{self.folder}'",
                "give the data as it was when they were cached, and the new examples after them",
            )
        if not existing.complete:
            raise UserError(
                f"the cache in '{self.folder}' is unfinished: "
                f"{existing.rows_done:,} of {existing.rows:,} examples",
                f"finish it first, with `limit={existing.rows}` instead of `append`",
            )
        if existing.codec.sample or (existing.preconditioner or {}).get("sample"):
            existing.data["begun"] = existing.rows_begun
        existing.null = None  # its scores are the best of fewer rows
        existing.rows, existing.data["identity"] = self.manifest.rows, self.manifest.data["identity"]
        self.remove_samples()  # they are of the examples before

    def _rename_grown(self) -> None:
        """Rename grown shards that the manifest records, and remove those that it does not."""
        for shard in self.manifest.shards:
            path = shard_path(self.folder, shard)
            if path.name != shard.file:
                os.replace(path, self.folder / shard.file)
        for path in self.folder.glob(grown(Path("*")).name):
            path.unlink()

    # ------------------------------------------------------------------------------------- writing

    def set_preconditioner(self, data: bytes) -> None:
        """Write the preconditioner's file, before any sketch is made with it."""
        record = self.manifest.preconditioner
        assert record is not None
        self.manifest.gradient["preconditioner"] = record | write_preconditioner(self.folder, data)
        self.manifest.write(self.folder)

    def set_check(self, record: dict[str, Any]) -> None:
        """Record the result of comparing gradients with autograd's, before any sketch is made."""
        self.manifest.gradient["check"] = record
        self.manifest.write(self.folder)

    def set_null(self, scores: dict[str, dict[str, list[float]]]) -> None:
        """Record the null distribution of the complete cache."""
        self.manifest.null = scores
        self.manifest.write(self.folder)

    def set_fitted_codec(self, shape: RowShape, basis: Basis | None, statistics: dict[str, float]) -> None:
        """Write the basis of the codec, if any, and record its shape, before any shard that it encodes."""
        self.manifest.fitted_codec = (
            FittedCodec(shape) if basis is None else write_basis(self.folder, basis, shape, statistics)
        )
        self.manifest.write(self.folder)

    def write(self, n: int, rows: Rows, counts: dict[str, int]) -> None:
        """Write the rows that shard n lacks and record it in the manifest; both are on disk when this
        returns.

        Raises UserError if they cannot be written, or the rows that the shard has are altered.
        """
        folder, before = self.folder, self.manifest.shard_at(n)
        if before is not None:
            problem = checksum_problem(folder, before)
            if problem:
                raise UserError(problem, "delete that file and run the same 'rapidin cache' again")
            rows = read_shard(folder, before, self.codec).joined(rows)
            statuses = {**before.counts, **counts}
            counts = {status: before.counts.get(status, 0) + counts.get(status, 0) for status in statuses}
        shard = self._write(n, rows, counts, beside=before is not None)
        self._record_with_receipts([shard])
        if before is not None:
            with _writing(folder):
                os.replace(grown(folder / shard.file), folder / shard.file)

    def record_receipts(self) -> None:
        """Record the shards that other processes wrote."""
        self._record_with_receipts([])

    def finish(self) -> None:
        """Delete all receipts, now that no other process writes."""
        receipts.forget_all(self.folder)

    def _record_with_receipts(self, shards: list[Shard]) -> None:
        """Record these shards and those that have receipts."""
        first_rows = {shard.first for shard in shards}
        others = [s for s in receipts.unrecorded(self.folder, self.manifest) if s.first not in first_rows]
        self.record([*shards, *others])
        receipts.forget(self.folder, others)

    def record(self, shards: list[Shard]) -> None:
        """Put shards that are on disk into the manifest, which is on disk when this returns."""
        if shards:
            new = {shard.first for shard in shards}
            others = [shard for shard in self.manifest.shards if shard.first not in new]
            self.manifest.shards = sorted([*others, *shards], key=lambda s: s.first)
            self.manifest.write(self.folder)

    def close(self) -> None:
        """Release the lock; the next writer records receipts that are left."""
        self._lock.close()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise the system's errors as UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write into '{folder}': {reason(error)}") from None


Finish = Callable[[], tuple[Rows, dict[str, int]]]  # gives a shard's rows and counts when they are computed


class WriterThread:
    """Writes a shard in a thread while the next one is made; one at a time, in order, all by the end."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rapidin-shards")
        self._pending: Future[None] | None = None

    def write(self, n: int, finish: Finish) -> None:
        """Start to write a shard, after the one before is written. Raises the error of that one, if any."""
        self._wait()
        self._pending = self._pool.submit(lambda: self._writer.write(n, *finish()))

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
        finally:
            self._pool.shutdown()
