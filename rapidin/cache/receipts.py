"""Receipts: JSON files beside the shards of processes that do not keep the manifest.

Each holds what the manifest is to record of one shard. The process that keeps the manifest records receipts
and deletes them; those that are there at the start of a run are from an earlier one that was killed before
that.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rapidin.cache.manifest import Manifest, Shard
from rapidin.cache.names import RECEIPTS
from rapidin.cache.shards import checksum, size_problem
from rapidin.errors import UserError
from rapidin.files import read_regular_file, replace_file

_MAX_BYTES = 1 << 16  # of one receipt


def _path(folder: Path, shard: Shard) -> Path:
    return folder / RECEIPTS / f"{shard.file}.json"


def leave(folder: Path, shard: Shard) -> None:
    """Write the receipt of a shard that is on disk; it is on disk too when this returns."""
    (folder / RECEIPTS).mkdir(exist_ok=True)
    replace_file(_path(folder, shard), (json.dumps(shard.to_json()) + "\n").encode())


def unrecorded(folder: Path, manifest: Manifest, *, check: bool = False) -> list[Shard]:
    """The shards that have receipts and that the manifest lacks.

    check: read each shard and compare its checksum. Receipts that are not of a whole shard of this cache are
    ignored.
    """
    done = {shard.first for shard in manifest.shards}
    shards = []
    for path in sorted((folder / RECEIPTS).glob("*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, UserError):
            shard = Shard.from_json(json.loads(read_regular_file(path, "receipt", "", most=_MAX_BYTES)))
            valid = manifest.fits(shard) and shard.first not in done and not size_problem(folder, shard)
            if valid and not (check and checksum(folder / shard.file) != shard.sha256):
                shards.append(shard)
    return shards


def forget(folder: Path, shards: Sequence[Shard]) -> None:
    """Delete the receipts of shards that the manifest on disk records."""
    for shard in shards:
        _path(folder, shard).unlink(missing_ok=True)


def forget_all(folder: Path) -> None:
    """Delete all receipts, when no process writes any."""
    shutil.rmtree(folder / RECEIPTS, ignore_errors=True)
