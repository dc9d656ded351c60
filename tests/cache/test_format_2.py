"""Caches of format version 2: they are read with equal results, resumed, merged and appended to, and the rows
that
today's codecs write have the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

from rapidin import Attributor
from rapidin.attribution import methods
from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.scan import all_scores
from rapidin.attribution.scan_pieces import CacheScan
from rapidin.cache import Cache, CacheWriter, Manifest
from rapidin.cache.merge import merge
from rapidin.cache.progress import Progress
from rapidin.cache.shards import Rows, write_shard
from rapidin.errors import UserError

CACHES = Path(__file__).parent / "cache_of_format_2"  # its write.py says how they were made
ROWS = Path(__file__).parent / "rows_of_format_2"  # of exact inputs; see its write.py
EXPECTED: dict[str, Any] = json.loads((CACHES / "expected.json").read_text())
TENSORS = load_file(CACHES / "expected.safetensors")
METHODS = [(m, n) for m in ("dot", "datainf", "fisher") for n in ("layer", "none", "cosine")]
LEARNED = "sign-learnt-kfac"
MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
# Options of the attributor and of the cache, of those caches that the tests resume.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float16": (
        {"preconditioner": "off", "width": 16, "include": ["*self_attn.q_proj*", "*mlp.down_proj*"]},
        {"dtype": "float16"},
    ),
    LEARNED: (
        {"width": 32, "loss": "sum", "include": ["*self_attn.q_proj*"]},
        {"bytes": 100, "sample": 12},
    ),
}


def read_json(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return value


def write_json(folder: Path, value: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(value))


def examples() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CACHES / "examples.jsonl").read_text().splitlines()]


def attributor(name: str) -> Attributor:
    return Attributor(tiny_llama(0, **MODEL), tiny_tokenizer(), **SETTINGS[name][0])


def copied(name: str, folder: Path, made: Attributor, shards: slice = slice(None)) -> Path:
    """A copy of a cache as of this model, with some of its shards.

    The weights of a seed, and so their hash, may differ between versions of torch."""
    shutil.copytree(CACHES / name, folder)
    value = read_json(folder)
    assert (value["version"], "packing" in value) == (2, True)
    value["model"]["identity"] = made.loaded.identity
    kept = value["shards"][shards]
    for shard in value["shards"]:
        if shard not in kept:
            (folder / shard["file"]).unlink()
    write_json(folder, value | {"shards": kept})
    return folder


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.safetensors"))}


def stored_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    shards = [rows.tensors for _, rows in cache.shards()]
    return {name: torch.cat([tensors[name] for tensors in shards]) for name in shards[0]}


def assert_near(one: torch.Tensor, other: torch.Tensor, least: float) -> None:
    """Each pair of rows with a sketch has at least this cosine."""
    live = other.norm(dim=1) > 0
    assert torch.equal(live, one.norm(dim=1) > 0)
    assert float(torch.nn.functional.cosine_similarity(one[live], other[live]).min()) > least


@pytest.mark.parametrize("name", EXPECTED)
def test_a_cache_opens_and_verifies(name: str) -> None:
    expected, cache = EXPECTED[name], Cache(CACHES / name)
    assert Cache.verify(CACHES / name) == expected["verify"] == []
    info = cache.info()
    for key, value in expected["info"].items():
        assert info["preconditioner" if key == "geometry" else key] == value
    for column in ("index", "status", "records"):
        assert torch.equal(getattr(cache, column)(), TENSORS[f"{name}/{column}"])
    torch.testing.assert_close(cache.lengths(), TENSORS[f"{name}/lengths"], rtol=1e-6, atol=0)
    if f"{name}/sketches" in TENSORS:
        torch.testing.assert_close(cache.sketches(), TENSORS[f"{name}/sketches"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_scans_have_equal_results(name: str) -> None:
    cache = Cache(CACHES / name)
    for n, (method, normalize) in enumerate(METHODS):
        query = methods.prepare(TENSORS[f"{name}/queries"], cache, method=method, normalize=normalize)
        got, want = all_scores(CacheScan(cache, query)), TENSORS[f"{name}/scores"][n]
        largest = float(want.nan_to_num().abs().max())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)
        assert float(got.isnan().float().mean()) < 0.5


def test_an_ensemble_is_read() -> None:
    members = Ensemble.read(CACHES).members
    assert [(Path(m.path).name, m.weight) for m in members] == [
        ("float16", 0.001),
        ("float32-lora-adam", 0.0005),
    ]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shards", [slice(0, 1), slice(1, 2), slice(0, 0)], ids=["first", "last", "none"])
def test_a_killed_run_resumes_as_format_3(name: str, shards: slice, tmp_path: Path) -> None:
    made, folder = attributor(name), tmp_path / "cache"
    kept = shard_bytes(copied(name, folder, made, shards))
    if shards.stop == 0:
        kept = {}
    (folder / "shard-000001.safetensors.partial").write_bytes(b"half")
    seen: list[Progress] = []
    cache = made.cache(examples(), folder, on_progress=seen.append, **SETTINGS[name][1])
    assert cache.manifest.complete
    assert seen[-1].resumed == sum(s["rows"] for s in read_json(CACHES / name)["shards"][shards])
    assert Cache.verify(folder) == []
    assert {name: data for name, data in shard_bytes(folder).items() if name in kept} == kept
    before = Cache(CACHES / name)
    assert torch.equal(cache.status(), before.status())
    assert torch.equal(cache.records(), before.records())
    assert_near(cache.sketches(), before.sketches(), 0.99)
    value = read_json(folder)
    assert value["version"] == 3
    assert not {"code", "packing"} & value.keys()
    assert "geometry" not in value["gradient"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_receipt_is_taken_up(name: str, tmp_path: Path) -> None:
    made, folder = attributor(name), tmp_path / "cache"
    copied(name, folder, made)
    value = read_json(folder)
    write_json(folder, value | {"shards": value["shards"][:1]})
    (folder / "receipts").mkdir()
    entry = value["shards"][1]
    (folder / "receipts" / f"{entry['file']}.json").write_text(json.dumps(entry))
    seen: list[Progress] = []
    cache = made.cache(examples(), folder, on_progress=seen.append, **SETTINGS[name][1])
    assert (seen[-1].resumed, seen[-1].tokens) == (12, 0)
    assert cache.manifest.complete
    assert shard_bytes(folder) == shard_bytes(CACHES / name)
    assert not (folder / "receipts").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_examples_are_appended(name: str, tmp_path: Path) -> None:
    made, folder = attributor(name), tmp_path / "cache"
    copied(name, folder, made)
    more = [*examples(), *({"prompt": f"Again {n}?", "completion": " The quick fox."} for n in range(7))]
    cache = made.cache(more, folder, append=True, **SETTINGS[name][1])
    before = Cache(CACHES / name)
    assert (len(cache), cache.manifest.rows_begun) == (19, 12 if name == LEARNED else 19)
    assert Cache.verify(folder) == []
    for tensor, value in stored_tensors(before).items():
        assert torch.equal(stored_tensors(cache)[tensor][:12], value)
    assert bool((cache.sketches([12, 18]).norm(dim=1) > 0).all())


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_are_merged_also_with_parts_of_format_3(name: str, tmp_path: Path) -> None:
    made = attributor(name)
    first = copied(name, tmp_path / "first", made, slice(0, 1))
    last = copied(name, tmp_path / "last", made, slice(1, 2))
    merged = merge(tmp_path / "merged", [first, last])
    assert shard_bytes(merged.path) == shard_bytes(CACHES / name)
    assert Cache.verify(merged.path) == []
    with CacheWriter(last, Manifest.read(last), shard_slice=(1, 2)):
        pass
    value = read_json(last)
    assert value["version"] == 3
    if value["gradient"]["preconditioner"] != "off":  # as a part has it that was made anew
        (last / "geometry.safetensors").rename(last / "preconditioner.safetensors")
        value["gradient"]["preconditioner"]["file"] = "preconditioner.safetensors"
        write_json(last, value)
    merged = merge(tmp_path / "merged-3", [first, last])
    assert shard_bytes(merged.path) == shard_bytes(CACHES / name)
    assert Cache.verify(merged.path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("code", None),
        ("packing", []),
        ("packing", {"shape": [], "file": None, "bytes": 0, "sha256": "", "statistics": {}}),
        ("gradient", "off"),
    ],
)
def test_a_damaged_manifest_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    shutil.copytree(CACHES / LEARNED, tmp_path / "cache")
    write_json(tmp_path / "cache", read_json(tmp_path / "cache") | {key: value})
    with pytest.raises(UserError, match="is damaged"):
        Cache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["float16", "int4", "fitted"])
def test_rows_are_encoded_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    cache, inputs = Cache(ROWS / name), load_file(ROWS / "inputs.safetensors")
    for (first, stored), shard in zip(cache.shards(), cache.manifest.shards, strict=True):
        rows = slice(first, first + shard.rows)
        tensors = cache.codec.encode(inputs["unit"][rows], inputs["length"][rows])
        if "size" in tensors:
            # The one number that is not the same everywhere: exp and log round as the processor has them.
            torch.testing.assert_close(tensors["size"], stored.tensors["size"], rtol=1e-6, atol=0)
            tensors["size"] = stored.tensors["size"]
        again = Rows(tensors, stored.index, stored.status, stored.truncated, stored.record)
        written = write_shard(tmp_path, shard.file, first, again, shard.counts)
        assert replace(written, xxh3=None) == shard  # which format 2 did not have
        data = (tmp_path / shard.file).read_bytes()
        assert data == (ROWS / name / shard.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256


def test_a_basis_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    manifest = Manifest.read(ROWS / "fitted")
    assert manifest.fitted_codec is not None
    codec = Cache(ROWS / "fitted").codec
    manifest.shards, fitted = [], manifest.fitted_codec
    with CacheWriter(tmp_path, manifest) as writer:
        writer.set_fitted_codec(fitted.shape, codec.basis, fitted.statistics)  # type: ignore[attr-defined]
        assert writer.manifest.fitted_codec == fitted
    assert (tmp_path / "basis.safetensors").read_bytes() == (ROWS / "fitted/basis.safetensors").read_bytes()
