"""The cache as bytes: whole shards or none, resume, refusal, checksums, hostile manifests."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tries
from small_caches import LAYERS, fill, manifest, rows

from rapidin.cache import Cache, CacheWriter
from rapidin.cache.codec import CodecConfig
from rapidin.cache.layout import Block
from rapidin.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    fill(tmp_path)
    cache = Cache(tmp_path)
    assert len(cache) == 10
    assert cache.manifest.complete
    assert cache.layers == LAYERS
    assert cache.manifest.counts == {"ok": 10}
    whole = torch.cat([rows(n, count).tensors["sketch"] for n, count in ((0, 4), (1, 4), (2, 2))]).float()
    assert torch.equal(cache.sketches(), whole)
    assert torch.equal(cache.sketches([9, 0, 4]), whole[[9, 0, 4]])
    assert cache.index([8]).tolist() == [8]
    assert cache.lengths().shape == (10, 2)
    with pytest.raises(IndexError):
        cache.sketches([10])
    assert cache.bytes == sum(p.stat().st_size for p in tmp_path.glob("*shard*"))
    assert Cache.verify(tmp_path) == []


def test_shards_are_read_through_a_memory_map(tmp_path: Path) -> None:
    fill(tmp_path)
    (_, part), *_ = Cache(tmp_path).shards()
    maps = Path("/proc/self/maps").read_text()
    assert "shard-000000.safetensors" in maps
    assert part.tensors["sketch"].shape == (4, 16)


def test_a_stopped_writer_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    fill(tmp_path / "b", 1)
    half = contents(tmp_path / "b")
    assert not Cache(tmp_path / "b").manifest.complete
    # A kill between the shard's rename and the manifest's, and one in the middle of a file, leave these
    # behind.
    (tmp_path / "b" / "shard-000001.safetensors").write_bytes(b"of an unrecorded run")
    (tmp_path / "b" / "shard-000002.safetensors.partial").write_bytes(b"half")
    fill(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert half["shard-000000.safetensors"] == contents(tmp_path / "b")["shard-000000.safetensors"]


def test_a_lost_or_short_shard_is_named_and_made_anew(tmp_path: Path) -> None:
    fill(tmp_path)
    before = contents(tmp_path)
    for spoil in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])):
        spoil(tmp_path / "shard-000001.safetensors")
        with pytest.raises(UserError, match="shard-000001"):
            Cache(tmp_path)
        assert ["shard-000001" in problem for problem in Cache.verify(tmp_path)] == [True]
        fill(tmp_path)
        assert contents(tmp_path) == before


def test_rows_keep_their_numbers_where_a_shard_is_yet_to_be_made_anew(tmp_path: Path) -> None:
    fill(tmp_path)
    whole = Cache(tmp_path).sketches()
    (tmp_path / "shard-000001.safetensors").unlink()
    fill(tmp_path, 0)  # a run that was killed before it wrote anything
    cache = Cache(tmp_path)
    assert (len(cache), cache.manifest.complete) == (6, False)
    assert torch.equal(cache.sketches([3, 9]), whole[[3, 9]])
    assert [first for first, _ in cache.shards()] == [0, 8]
    for row in (4, 7, 10, -1):
        with pytest.raises(IndexError):
            cache.sketches([row])


def alter(path: Path, at: int = -1) -> None:
    """Changes one byte of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_altered_shard_is_noticed_by_whoever_reads_it_first(tmp_path: Path) -> None:
    fill(tmp_path)
    cache = Cache(tmp_path)
    cache.sketches([9])  # of the last shard
    path = tmp_path / "shard-000001.safetensors"
    alter(path)
    assert cache.index([0, 9]).tolist() == [0, 9]  # reads no other shard
    for read in (lambda: cache.index([4]), cache.sketches, lambda: list(Cache(tmp_path).shards())):
        with pytest.raises(UserError, match=r"shard-000001.safetensors' is altered: .*; delete that file"):
            read()
    assert len(list(Cache(tmp_path, compared=False).shards())) == 3
    alter(path)
    assert len(cache.sketches()) == 10
    # Once it was compared, nothing is read of it again before somebody writes it.
    before = path.stat()
    alter(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(Cache(tmp_path).sketches()) == 10
    assert len(Cache.verify(tmp_path)) == 1
    os.utime(path)
    with pytest.raises(UserError, match="is altered"):
        Cache(tmp_path).sketches()


def test_the_fast_checksum_is_that_of_the_file_and_a_manifest_may_lack_it(tmp_path: Path) -> None:
    import xxhash

    fill(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    for shard in value["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        assert shard["xxh3"] == xxhash.xxh3_64_hexdigest(data)
    for shard in value["shards"]:
        del shard["xxh3"]
    path.write_text(json.dumps(value))
    alter(tmp_path / "shard-000001.safetensors")
    assert len(Cache(tmp_path).sketches()) == 10  # as earlier versions read it
    assert "altered" in Cache.verify(tmp_path)[0]
    with CacheWriter(tmp_path, manifest()) as writer:
        assert writer.missing == []
        writer.manifest.write(tmp_path)
    assert json.loads(path.read_text()) == value  # nothing is said that was not compared
    value["shards"][0]["xxh3"] = "0" * 16
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"shard-000000.safetensors' is altered"):
        Cache(tmp_path).index([0])
    assert "shard-000000" in Cache.verify(tmp_path)[0]


def test_an_altered_shard_is_named_by_verify(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert [("shard-000002" in p, "altered" in p) for p in Cache.verify(tmp_path)] == [(True, True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"source": {}, "identity": {"model": "9"}}}, "with another model: its contents"),
        (
            {"model": {"source": {}, "identity": {"model": "1", "adapter": "2"}}},
            "without an adapter, and one is",
        ),
        (
            {"sketch": {"projection": "tensor", "width": 8, "seed": 1}},
            "another sketch (seed: 0 in the cache, 1 requested)",
        ),
        ({"gradient": {"at": [1.0]}}, "other gradients"),
        ({"data": {"path": "train.jsonl", "identity": "3"}}, "from other data"),
        ({"codec": CodecConfig("float32")}, "another codec"),
        ({"rows": 11}, "another number of examples"),
        ({"layers": [LAYERS[0], Block("c.weight", (5, 2), 0.5, 8, 8)]}, "other layers"),
    ],
)
def test_a_cache_that_is_not_the_one_wanted_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    fill(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        CacheWriter(tmp_path, manifest(**changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_data_that_has_moved_is_still_the_same_data(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    fill(tmp_path, data={"path": "elsewhere.jsonl", "identity": "2"})
    assert Cache(tmp_path).manifest.data["path"] == "elsewhere.jsonl"


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match=r"something else \('thesis.tex'\)"):
        CacheWriter(tmp_path, manifest())
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_two_writers_are_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, manifest()), pytest.raises(UserError, match="another process"):
        CacheWriter(tmp_path, manifest())
    fill(tmp_path)


def test_a_small_disk_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="MB free"):
        CacheWriter(tmp_path, manifest())


def test_a_write_that_fails_is_one_line_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1)
    before = contents(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with CacheWriter(tmp_path, manifest()) as writer:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            writer.write(1, rows(1, 4), {"ok": 4})
        monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"format": "else"}', '{"format": "rapidin-cache"}', "\udcff", "[" * 100_000],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        Cache(tmp_path)
    assert "\n" not in str(error.value)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    value = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(value | {"version": 4}))
    with pytest.raises(UserError, match="format version 4, this rapidin reads 3"):
        Cache(tmp_path)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[leaf for key, part in items for leaf in _leaves(part, (*path, key))]]


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({})
)


@tries(300)
@given(data=st.data(), new=JSON)
def test_any_altered_manifest_is_read_or_refused(tmp_path: Path, data: st.DataObject, new: Any) -> None:
    """No value anywhere in a manifest makes anything but a UserError, or leads to a file outside the
    folder."""
    if not (tmp_path / "good.json").exists():
        fill(tmp_path / "cache")
        shutil.copy(tmp_path / "cache" / "manifest.json", tmp_path / "good.json")
    value = json.loads((tmp_path / "good.json").read_text())
    path = data.draw(st.sampled_from(_leaves(value)[1:]))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(value))
    try:
        cache = Cache(tmp_path / "cache")
        assert len(cache.sketches()) == len(cache)
    except UserError:
        pass
