"""Receipts: what a process that does not keep the manifest leaves beside a shard that it has written.

A file of JSON a shard, with what the manifest says of it. Whoever keeps the manifest takes receipts up and
deletes them; one that is found at the start of a run is from an earlier one that died before that.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rapidin.cache.manifest import Manifest, Shard, shard_of_json
from rapidin.cache.shards import checksum, size_problem
from rapidin.errors import UserError
from rapidin.files import read_own, replace_file

FOLDER = "receipts"
_MOST = 1 << 16  # bytes of one


def leave(folder: Path, shard: Shard) -> None:
    """Write the receipt of a shard that is on disk; it is there when this returns."""
    receipts = folder / FOLDER
    receipts.mkdir(exist_ok=True)
    replace_file(receipts / f"{shard.file}.json", (json.dumps(asdict(shard)) + "\n").encode())


def found(folder: Path, manifest: Manifest, *, checked: bool = False) -> list[Shard]:
    """The shards that there are receipts of and that the manifest lacks.

    checked: read each and compare its checksum. Receipts of anything else than a whole shard of this cache
    are left out.
    """
    done = {shard.first for shard in manifest.shards}
    shards = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, UserError):
            shard = shard_of_json(json.loads(read_own(path, "receipt", "", most=_MOST)))
            whole = manifest.has(shard) and shard.first not in done and not size_problem(folder, shard)
            if whole and not (checked and checksum(folder / shard.file) != shard.sha256):
                shards.append(shard)
    return shards


def forget(folder: Path, shards: Sequence[Shard]) -> None:
    """Delete the receipts of shards that the manifest on disk has."""
    for shard in shards:
        (folder / FOLDER / f"{shard.file}.json").unlink(missing_ok=True)


def forget_all(folder: Path) -> None:
    """Delete all receipts, when no process writes any."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
