"""Parts of one cache, made on machines without a common folder, put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rapidin.cache.manifest import Manifest, Shard
from rapidin.cache.reader import Cache, CacheWriter
from rapidin.cache.shards import read_preconditioner, shard_path, size_problem
from rapidin.errors import UserError
from rapidin.files import reason, replace_file

_PIECE = 4 << 20  # bytes copied at a time
_RECORDED = 256 << 20  # bytes copied after which the manifest is written


def merge(
    out: str | Path, folders: Sequence[str | Path], on_progress: Callable[[int, int], None] | None = None
) -> Cache:
    """Gather the shards of these caches into the cache `out`; goes on where an earlier call stopped.

    Every byte is compared with its checksum on the way. on_progress(bytes copied, bytes in all). Raises
    UserError where the folders are not parts of one cache, a shard is missing, altered or in two of them, or
    the folder or disk will not do.
    """
    parts = {Path(folder): Manifest.read(Path(folder)) for folder in folders}
    _refuse_others(Path(out), parts)
    where = _places(parts)
    first, whole = next(iter(parts.items()))
    shards = [shard for _, shard in where]
    with CacheWriter(out, replace(whole, packing=None, shards=[])) as writer:
        if whole.preconditioner is not None:
            read_preconditioner(first, whole.preconditioner, dict)
            writer.set_preconditioner((first / whole.preconditioner["file"]).read_bytes())
        packing = whole.packing
        if packing is not None and packing.file is not None and writer.manifest.packing is None:
            _copy(first / packing.file, writer.folder / packing.file, packing.sha256)
        writer.manifest.packing = packing
        missing = set(writer.missing)
        done, total = 0, sum(shard.bytes for shard in shards)
        copied: list[Shard] = []
        for n, (folder, shard) in enumerate(where):
            if n in missing:
                _copy(shard_path(folder, shard), writer.folder / shard.file, shard.sha256)
                copied.append(shard)
            done += shard.bytes
            if sum(s.bytes for s in copied) >= _RECORDED:
                writer.record(copied)
                copied = []
            if on_progress:
                on_progress(done, total)
        writer.record(copied)
    return Cache(out)


def _refuse_others(out: Path, parts: dict[Path, Manifest]) -> None:
    """Raise UserError unless these are parts of one cache, and `out` is none of them."""
    first, whole = next(iter(parts.items()))
    for folder, manifest in parts.items():
        if folder.resolve() == out.resolve():
            raise UserError(f"'{out}' is one of the parts", "name a new folder first")
        if not manifest.shards:
            raise UserError(f"the cache in '{folder}' holds no examples", "leave it out, or cache its part")
        try:
            manifest.refuse_unless_same(whole, folder)
        except UserError as error:
            raise UserError(
                f"{error.what}, and so not as '{first}' was", "merge parts that one command made (--part)"
            ) from None
        learnt = (manifest.packing, whole.packing), (manifest.preconditioner, whole.preconditioner)
        for what, (there, here) in zip(("code", "preconditioner"), learnt, strict=True):
            if there != here:
                raise UserError(
                    f"the caches in '{first}' and '{folder}' learnt another {what} each",
                    "make what they share once, with --part 0/N, and copy it to all machines first",
                )


def _places(parts: dict[Path, Manifest]) -> list[tuple[Path, Shard]]:
    """Where each shard of the whole is, in their order; UserError where one is missing or there twice."""
    found: dict[int, tuple[Path, Shard]] = {}
    for folder, manifest in parts.items():
        for shard in manifest.shards:
            problem = size_problem(folder, shard)
            if problem:
                raise UserError(problem, "run the same 'rapidin cache' again: only it is made anew")
            n = shard.first // manifest.shard_rows
            if n in found:
                raise UserError(
                    f"'{shard.file}' is in '{found[n][0]}' and in '{folder}'", "name each part once"
                )
            found[n] = folder, shard
    wanted = next(iter(parts.values())).shards_in_all
    missing = [n for n in range(wanted) if n not in found]
    if missing:
        raise UserError(
            f"{len(missing):,} of {wanted:,} shards are in none of the folders, such as number {missing[0]}",
            "name all parts, each of them finished",
        )
    return [found[n] for n in range(wanted)]


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copy a file, whole or not at all; UserError where its bytes are not those of the checksum."""

    def pieces() -> Iterator[bytes]:
        digest = hashlib.sha256()
        try:
            with open(source, "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    yield piece
        except OSError as error:
            raise UserError(f"cannot read '{source}': {reason(error)}") from None
        if digest.hexdigest() != sha256:
            raise UserError(
                f"'{source}' is altered: its checksum is not the manifest's",
                "delete it, make it anew with the same 'rapidin cache', and merge again",
            )

    replace_file(target, pieces())
