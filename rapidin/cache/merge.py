"""Merges parts of one cache that were made on machines without a common folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rapidin.cache.learned_files import read_preconditioner
from rapidin.cache.manifest import Manifest, Shard
from rapidin.cache.names import DECOYS
from rapidin.cache.reader import Cache, decoys_folder
from rapidin.cache.shards import shard_path, size_problem
from rapidin.cache.writer import CacheWriter
from rapidin.errors import UserError
from rapidin.files import reason, replace_file

_CHUNK = 4 << 20  # bytes copied at a time
_RECORD_EVERY = 256 << 20  # bytes copied, after which the manifest is written


def merge(
    out: str | Path, folders: Sequence[str | Path], on_progress: Callable[[int, int], None] | None = None
) -> Cache:
    """Copy the shards of these caches into the cache `out`; resumes where an earlier call stopped.

    Every byte is compared with its checksum on the way. on_progress(bytes copied, bytes in all). Raises
    UserError if the folders are not parts of one cache, if a shard is missing, altered or in two of them, or
    if `out` or its disk is not suitable.
    """
    parts = {Path(folder): Manifest.read(Path(folder)) for folder in folders}
    _refuse_unlike_parts(Path(out), parts)
    located = _locate_shards(parts)
    first, whole = next(iter(parts.items()))
    with CacheWriter(out, replace(whole, fitted_codec=None, shards=[], null=None)) as writer:
        copy_learned(first, whole, writer)
        missing = set(writer.missing)
        done, total = 0, sum(shard.bytes for _, shard in located)
        copied: list[Shard] = []
        for n, (folder, shard) in enumerate(located):
            if n in missing:
                _copy(shard_path(folder, shard), writer.folder / shard.file, shard.sha256)
                copied.append(shard)
            done += shard.bytes
            if sum(s.bytes for s in copied) >= _RECORD_EVERY:
                writer.record(copied)
                copied = []
            if on_progress:
                on_progress(done, total)
        writer.record(copied)
    return Cache(out)


def copy_learned(folder: Path, manifest: Manifest, writer: CacheWriter) -> None:
    """Copy the preconditioner and the basis of a cache, and take over its fitted codec."""
    if manifest.preconditioner is not None:
        read_preconditioner(folder, manifest.preconditioner, dict)
        writer.set_preconditioner((folder / manifest.preconditioner["file"]).read_bytes())
    fitted = manifest.fitted_codec
    if fitted is not None and fitted.file is not None and writer.manifest.fitted_codec is None:
        _copy(folder / fitted.file, writer.folder / fitted.file, fitted.sha256)
    writer.manifest.fitted_codec = fitted


def _refuse_unlike_parts(out: Path, parts: dict[Path, Manifest]) -> None:
    """Raise UserError unless these are parts of one cache, and `out` is not one of them."""
    first, whole = next(iter(parts.items()))
    for folder, manifest in parts.items():
        if folder.resolve() == out.resolve():
            raise UserError(f"'{out}' is one of the parts", "name a new folder first")
        if decoys_folder(folder) is not None:
            raise UserError(
                f"the cache in '{folder}' has decoys, which merging would lose",
                f"move '{folder / DECOYS}' away, and run 'rapidin cache' on the merged cache with `decoys`",
            )
        if not manifest.shards:
            raise UserError(f"the cache in '{folder}' holds no examples", "leave it out, or cache its part")
        try:
            manifest.refuse_unless_same(whole, folder)
        except UserError as error:
            raise UserError(
                f"{error.what}, unlike the one in '{first}'", "merge parts that one command made (`part`)"
            ) from None
        if manifest.fitted_codec != whole.fitted_codec:
            _refuse_learned("bases", first, folder)
        if _without_name(manifest.preconditioner) != _without_name(whole.preconditioner):
            _refuse_learned("preconditioners", first, folder)


def _refuse_learned(what: str, first: Path, folder: Path) -> None:
    raise UserError(
        f"the caches in '{first}' and '{folder}' have learned different {what}",
        "learn them once, with `part` 0/N, and copy them to all machines first",
    )


def _without_name(record: dict[str, object] | None) -> dict[str, object] | None:
    """The record of a preconditioner without its file's name, which differs between format versions."""
    return None if record is None else {key: value for key, value in record.items() if key != "file"}


def _locate_shards(parts: dict[Path, Manifest]) -> list[tuple[Path, Shard]]:
    """The folder of each shard of the whole cache, in order. Raises UserError if one is missing or is in two
    folders."""
    located: dict[int, tuple[Path, Shard]] = {}
    for folder, manifest in parts.items():
        for shard in manifest.shards:
            problem = size_problem(folder, shard)
            if problem:
                raise UserError(problem, "run the same 'rapidin cache' again: only that shard is made again")
            n = shard.first // manifest.shard_rows
            if n in located:
                raise UserError(
                    f"'{shard.file}' is in '{located[n][0]}' and in '{folder}'", "name each part once"
                )
            located[n] = folder, shard
    total = next(iter(parts.values())).shards_in_all
    missing = [n for n in range(total) if n not in located]
    if missing:
        raise UserError(
            f"{len(missing):,} of {total:,} shards are in none of the folders, such as number {missing[0]}",
            "name all parts, each of them finished",
        )
    return [located[n] for n in range(total)]


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copy a file, whole or not at all. Raises UserError if its checksum is another one."""

    def chunks() -> Iterator[bytes]:
        digest = hashlib.sha256()
        try:
            with open(source, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    yield chunk
        except OSError as error:
            raise UserError(f"cannot read '{source}': {reason(error)}") from None
        if digest.hexdigest() != sha256:
            raise UserError(
                f"'{source}' is altered: its checksum is not the manifest's",
                "delete it, make it again with the same 'rapidin cache', and merge again",
            )

    replace_file(target, chunks())
