"""Receipts: those of whole shards of this cache that the manifest lacks are found, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_caches import fill, manifest

from rapidin.cache import CacheWriter, Manifest
from rapidin.cache.manifest import Shard
from rapidin.cache.receipts import forget, forget_all, leave, unrecorded


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Those of a whole cache of three, each with a receipt."""
    fill(tmp_path)
    found = Manifest.read(tmp_path).shards
    for shard in found:
        leave(tmp_path, shard)
    return list(found)


def receipt(folder: Path, n: int) -> Path:
    return folder / "receipts" / f"shard-{n:06d}.safetensors.json"


def test_receipts_of_shards_that_the_manifest_lacks_are_found(tmp_path: Path, shards: list[Shard]) -> None:
    assert len(shards) == 3
    for check in (False, True):
        assert unrecorded(tmp_path, manifest(), check=check) == shards
        assert unrecorded(tmp_path, manifest(shards=[shards[1]]), check=check) == [shards[0], shards[2]]
        assert unrecorded(tmp_path, Manifest.read(tmp_path), check=check) == []


def test_a_shard_with_other_bytes_is_found_only_without_a_check(tmp_path: Path, shards: list[Shard]) -> None:
    path = tmp_path / shards[1].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert unrecorded(tmp_path, manifest()) == shards
    assert unrecorded(tmp_path, manifest(), check=True) == [shards[0], shards[2]]
    path.write_bytes(data[:-1])
    assert unrecorded(tmp_path, manifest()) == [shards[0], shards[2]]
    path.unlink()
    assert unrecorded(tmp_path, manifest()) == [shards[0], shards[2]]


@pytest.mark.parametrize(
    "changed",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        {"first": 5},
        {"first": -4},
        {"first": 12},
        {"rows": 3},
        {"rows": "4"},
        {"file": "../shard-000001.safetensors"},
        {"sha256": None},
        {"counts": None},
        {"more": " " * (1 << 16)},
    ],
    ids=lambda value: str(value)[:40],
)
def test_receipts_of_no_whole_shard_of_this_cache_are_left_out(
    tmp_path: Path, shards: list[Shard], changed: Any
) -> None:
    path = receipt(tmp_path, 1)
    value = json.loads(path.read_text())
    path.write_text(changed if isinstance(changed, str) else json.dumps(value | changed))
    assert unrecorded(tmp_path, manifest()) == [shards[0], shards[2]]


def test_receipts_are_forgotten(tmp_path: Path, shards: list[Shard]) -> None:
    forget(tmp_path, [shards[0], shards[2]])
    assert unrecorded(tmp_path, manifest()) == [shards[1]]
    forget(tmp_path, shards)
    assert unrecorded(tmp_path, manifest()) == []
    leave(tmp_path, shards[2])
    forget_all(tmp_path)
    forget_all(tmp_path)
    assert not (tmp_path / "receipts").exists()
    assert unrecorded(tmp_path, manifest()) == []


def test_a_resumed_cache_takes_over_the_shards_whose_bytes_are_those_of_their_receipts(
    tmp_path: Path, shards: list[Shard]
) -> None:
    existing = Manifest.read(tmp_path)
    existing.shards = shards[:1]
    existing.write(tmp_path)
    path = tmp_path / shards[2].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with CacheWriter(tmp_path, manifest()) as writer:
        assert writer.missing == [2]
        assert not (tmp_path / "receipts").exists()
    assert Manifest.read(tmp_path).shards == shards[:2]
