"""`rapidin cache --part` and `rapidin merge`: the parts of a cache put together are the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import Ran, caller
from tiny import records, save_tiny

from rapidin.cache import Cache, Manifest
from rapidin.cache.merge import merge
from rapidin.cli import main
from rapidin.errors import UserError

ROWS = 36


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an adapter, its data, and two caches of them that were made in one go."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny(folder, lora=True)
    rows = [row | ({"completion": ""} if n % 11 == 5 else {}) for n, row in enumerate(records(ROWS))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*caching(folder, folder / "compact"), "--quiet"]) == 0
    assert main([*caching(folder, folder / "plain", learnt=False), "--quiet"]) == 0
    return folder


def caching(work: Path, out: Path, *, learnt: bool = True) -> list[str]:
    """The command line that makes a cache with a preconditioner and a basis, or without both."""
    compact = ["--bytes", "256", "--sample", "16", "--precondition", "sample"]
    return [
        *("cache", str(work / "model"), "--adapter", str(work / "adapter")),
        *("--data", str(work / "train.jsonl"), "--out", str(out), "--no-null"),
        *("--width", "32", "--shard-rows", "4", *(compact if learnt else ["--precondition", "off"])),
    ]


@pytest.fixture(scope="module")
def parts(work: Path) -> list[Path]:
    """Three parts of the compact cache, from folders that share what is learnt."""
    folders = [work / f"part-{n}" for n in (1, 2, 3)]
    assert main([*caching(work, work / "shared"), "--part", "0/3", "--quiet"]) == 0
    for n, folder in enumerate(folders, 1):
        shutil.copytree(work / "shared", folder)
        assert main([*caching(work, folder), "--part", f"{n}/3", "--quiet"]) == 0
    return folders


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """run(*arguments) -> Ran"""
    return caller(capsys)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_merged_parts_are_the_cache_of_one_process(
    work: Path, parts: list[Path], tmp_path: Path, run: Any
) -> None:
    assert not Manifest.read(work / "shared").shards
    assert [len(Cache(part)) for part in parts] == [12, 12, 12]
    out = tmp_path / "whole"
    ran: Ran = run("merge", out, *parts)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith(f"rapidin: 36 examples of 3 parts are in {out} (")
    assert contents(out) == contents(work / "compact")
    # Going on: what is there stays, what is lost or was never copied comes.
    (out / "shard-000004.safetensors").unlink()
    kept = (out / "shard-000005.safetensors").stat().st_mtime_ns
    assert run("merge", out, *parts, "--quiet") == Ran(0, "", "")
    assert contents(out) == contents(work / "compact")
    assert (out / "shard-000005.safetensors").stat().st_mtime_ns == kept


def test_what_all_parts_share_is_to_be_copied(work: Path, tmp_path: Path, run: Any) -> None:
    ran: Ran = run(*caching(work, tmp_path / "shared"), "--part", "0/3")
    assert (ran.code, ran.out) == (0, "")
    said = f"what all parts share is in {tmp_path / 'shared'}; copy it to each machine, and continue there"
    assert said in " ".join(ran.err.split())
    for wrong in ("4/3", "1", "one/two"):
        ran = run(*caching(work, tmp_path / "other"), "--part", wrong)
        assert (ran.code, ran.out) == (2, "")
        assert "--part" in ran.err.splitlines()[-1]


def test_what_is_no_whole_is_refused(work: Path, parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole"
    altered, own, scaled, cut = (tmp_path / name for name in ("altered", "own", "scaled", "cut"))
    shutil.copytree(parts[1], altered)
    shard = altered / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    shutil.copytree(parts[1], cut)
    shard = cut / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    for folder in (own, scaled):
        shutil.copytree(parts[0], folder)
        value: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        learnt = value["fitted_codec"] if folder == own else value["gradient"]["preconditioner"]
        learnt["sha256"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(value))
    for folders, words in (
        (parts[:2], "3 of 9 shards are in none of the folders, such as number 2"),
        ([parts[0], work / "compact", parts[2]], "is in"),
        ([parts[0], work / "plain"], "merge parts that one command made"),
        ([parts[0], altered, parts[2]], "is altered"),
        ([parts[0], cut, parts[2]], "only that shard is made again"),
        ([own, *parts[1:]], "have learned different bases"),
        ([scaled, *parts[1:]], "have learned different preconditioners"),
        ([work / "nowhere", *parts], "cache not found"),
        ([*parts, work / "shared"], "holds no examples"),
    ):
        with pytest.raises(UserError) as error:
            merge(out, folders)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is one of the parts"):
        merge(parts[0], parts)
    assert main(["merge", str(out), *map(str, parts), "--quiet"]) == 0  # nothing is in the way
    assert contents(out) == contents(work / "compact")
