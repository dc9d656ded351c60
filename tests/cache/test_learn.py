"""Compact caches from data to hits: budgets, samples, killed runs, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import records, tiny_llama, tiny_lora, tiny_tokenizer

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.caching import format_of
from rapidin.attribution.options import NORMALIZE, CacheOptions
from rapidin.attribution.provenance import manifest_of
from rapidin.cache import Cache
from rapidin.cache.build import sample_rows, shard_rows
from rapidin.cache.progress import Progress
from rapidin.errors import UserError

ROWS = 60
LEARNT = {"bytes": 250, "sample": 24}


@pytest.fixture(scope="module")
def attributor() -> Attributor:
    return Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64, preconditioner="off")


@pytest.fixture(scope="module")
def whole(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return attributor.cache(records(ROWS), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def learnt(attributor: Attributor, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return attributor.cache(records(ROWS), tmp_path_factory.mktemp("learnt"), shard_rows=16, **LEARNT)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def ranking(attributor: Attributor, cache: Cache, normalize: Any) -> torch.Tensor:
    """[queries, ROWS]: each row's score."""
    texts = [(r["prompt"], r["completion"]) for r in records(8, seed=5)]
    out = torch.zeros(len(texts), ROWS)
    results = attributor.query(cache, texts, top_k=ROWS, normalize=normalize, examples=False)
    for q, result in enumerate(results):
        for hit in result.top:
            out[q, hit.index] = hit.score
    return out


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"dtype": "int8"}, 0.999),
        ({"dtype": "int4"}, 0.99),
        ({"dtype": "sign"}, 0.93),
        ({"bytes": 250}, 0.97),  # learns from all rows
        ({"bytes": 250, "sample": 0}, 0.93),
        ({"bytes": 600, "dtype": "int4"}, 0.99),
    ],
)
def test_a_compact_cache_scores_nearly_as_the_whole_one(
    attributor: Attributor,
    whole: Cache,
    tmp_path: Path,
    settings: dict[str, Any],
    least: float,
    normalize: str,
) -> None:
    made = attributor.cache(records(ROWS), tmp_path / "made", **settings)
    budget = settings.get("bytes")
    assert budget is None or made.manifest.row_bytes <= budget
    one, two = ranking(attributor, whole, normalize), ranking(attributor, made, normalize)
    alike = torch.corrcoef(torch.stack((one.flatten(), two.flatten())))[0, 1]
    assert float(alike) > least
    lengths = (made.lengths() / whole.lengths()).log().abs()
    assert float(lengths[whole.lengths() > 0].median()) < 0.1
    assert Cache.verify(made.path) == []


@pytest.mark.parametrize(
    ("settings", "least"), [({"dtype": "int4"}, 0.98), ({"dtype": "sign"}, 0.89), ({"bytes": 250}, 0.95)]
)
def test_nearly_white_gradients_lose_a_little_more_in_few_bits(
    tmp_path: Path, settings: dict[str, Any], least: float
) -> None:
    attributor = Attributor(tiny_lora(tiny_llama()), tiny_tokenizer(), width=64)
    whole = attributor.cache(records(ROWS), tmp_path / "whole")
    made = attributor.cache(records(ROWS), tmp_path / "made", **settings)
    one, two = (ranking(attributor, cache, "layer").flatten() for cache in (whole, made))
    assert float(torch.corrcoef(torch.stack((one, two)))[0, 1]) > least


def test_nothing_but_the_cache_is_left(learnt: Cache) -> None:
    names = {p.name for p in learnt.path.iterdir()}
    shards = {shard.file for shard in learnt.manifest.shards}
    assert names == {"manifest.json", "basis.safetensors", ".lock"} | shards
    assert learnt.manifest.fitted_codec is not None
    assert learnt.manifest.fitted_codec.statistics["sample"] == 24
    assert "unlike_sample" in learnt.manifest.counts


def test_a_second_run_makes_the_same_bytes_or_nothing(
    attributor: Attributor, learnt: Cache, tmp_path: Path
) -> None:
    attributor.cache(records(ROWS), tmp_path / "again", shard_rows=16, **LEARNT)
    assert contents(tmp_path / "again") == contents(learnt.path)
    seen: list[Progress] = []
    attributor.cache(records(ROWS), tmp_path / "again", shard_rows=16, on_progress=seen.append, **LEARNT)
    assert (seen[-1].resumed, seen[-1].tokens) == (ROWS, 0)


@pytest.mark.parametrize("when", [3, 20, 30, 45])
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(
    attributor: Attributor, learnt: Cache, tmp_path: Path, when: int
) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done >= when:
            raise Stop

    with pytest.raises(Stop):
        attributor.cache(records(ROWS), tmp_path, shard_rows=16, on_progress=stop, **LEARNT)
    seen: list[Progress] = []
    attributor.cache(records(ROWS), tmp_path, shard_rows=16, on_progress=seen.append, **LEARNT)
    assert contents(tmp_path) == contents(learnt.path)
    assert not (tmp_path / "sample").exists()
    assert seen[-1].done == ROWS


def test_the_sample_is_drawn_by_the_seed() -> None:
    assert sample_rows(5, 10, 0) == [0, 1, 2, 3, 4]
    drawn = sample_rows(1000, 50, 0)
    assert drawn == sorted(set(drawn)) == sample_rows(1000, 50, 0)
    assert drawn != sample_rows(1000, 50, 1)
    assert 300 < sum(drawn) / 50 < 700


def test_rows_unlike_the_sample_are_counted(attributor: Attributor, tmp_path: Path) -> None:
    usual = [{"prompt": "one two: ", "completion": f"three {word} four"} for word in ("fox", "dog", "five")]
    odd = [{"prompt": "Zq#@ ", "completion": "!!%% 12 ~~ ^^ ;;"}]
    rows = [usual[i % 3] | {"prompt": "one two " * (1 + i % 4) + ": "} for i in range(200)]
    for row in [row for row in range(200) if row not in sample_rows(200, 32, 0)][:5]:
        rows[row] = odd[0]
    made = attributor.cache(rows, tmp_path, bytes=250, sample=32)
    assert made.manifest.counts["unlike_sample"] >= 5


def test_settings_that_do_not_go_together_are_said(attributor: Attributor, tmp_path: Path) -> None:
    for settings, words in (
        ({"dtype": "int2"}, "unknown dtype 'int2'"),
        ({"dtype": "float16", "bytes": 999}, "every number"),
        ({"dtype": "sign", "sample": 64}, "needs a budget"),
        ({"bytes": 40}, "`bytes` must be at least"),
        ({"bytes": 400, "sample": 3}, "at least 8"),
        ({"bytes": 400, "sample": -1}, "`sample` must be at least 0"),
    ):
        with pytest.raises(UserError, match=words):
            attributor.cache(records(4), tmp_path / "x", **settings)
    odd = Attributor(tiny_llama(), tiny_tokenizer(), width=48)
    with pytest.raises(UserError, match="power of two"):
        odd.cache(records(4), tmp_path / "x", dtype="sign")


def test_a_cache_with_another_code_is_refused(attributor: Attributor, learnt: Cache) -> None:
    with pytest.raises(UserError, match="with another code"):
        attributor.cache(records(ROWS), learnt.path, shard_rows=16, bytes=300, sample=24)


def test_a_lost_or_altered_basis_is_named(attributor: Attributor, tmp_path: Path) -> None:
    made = attributor.cache(records(ROWS), tmp_path, shard_rows=16, **LEARNT)
    path = tmp_path / "basis.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\x01\x02\x03\x04")
    assert any("basis" in problem for problem in Cache.verify(tmp_path))
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"basis.* bytes instead of"):
        Cache(tmp_path).sketches()
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        attributor.query(Cache(tmp_path), [("one ", "two")], examples=False)
    (tmp_path / made.manifest.shards[0].file).unlink()
    with pytest.raises(UserError, match="is missing"):
        attributor.cache(records(ROWS), tmp_path, shard_rows=16, **LEARNT)


def test_a_hostile_packing_is_damage_not_a_crash(
    attributor: Attributor, learnt: Cache, tmp_path: Path
) -> None:
    manifest = json.loads((learnt.path / "manifest.json").read_text())
    for change in (
        {"shape": {}},
        {"shape": {**manifest["fitted_codec"]["shape"], "per_layer": [1]}},
        {"shape": {**manifest["fitted_codec"]["shape"], "shared": -1}},
        {"bytes": "many"},
        {"statistics": {"sample": "x"}},
    ):
        broken = manifest | {"fitted_codec": manifest["fitted_codec"] | change}
        (tmp_path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="damaged"):
            Cache(tmp_path)


def test_shards_are_large_enough_and_not_more_than_may_be_lost(attributor: Attributor) -> None:
    for rows, budget, want in ((500, 2048, 1024), (10**6, 2048, 7812), (10**8, 2048, 8192)):
        config = format_of(CacheOptions(bytes=budget), attributor.source.width)
        manifest = manifest_of(attributor.source, config, rows)
        assert shard_rows(manifest) == want


def test_width_by_the_number_of_layers() -> None:
    assert Attributor(tiny_llama(), tiny_tokenizer(), width="auto").source.width == 8192
