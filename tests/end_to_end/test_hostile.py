"""Caches that nobody vouches for are read or refused in one line: inputs that once failed, and new ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_caches import LAYERS, fill, manifest
from tiny import save_tiny

from rapidin.cache import Cache, CacheWriter, Manifest
from rapidin.errors import UserError
from rapidin.gradients.load import load_model

pytestmark = pytest.mark.full

FUZZ = Path(__file__).parents[1] / "support" / "fuzz_cache.py"
CORPUS = Path(__file__).with_name("hostile")


def test_inputs_that_once_failed_and_new_ones() -> None:
    ran = subprocess.run(
        [sys.executable, str(FUZZ), "--corpus", str(CORPUS), "--inputs", "1500", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = ran.stdout
    assert ran.returncode == 0, said + ran.stderr
    assert f"{len(list(CORPUS.iterdir()))} kept inputs: " in said
    drawn = said.splitlines()[-1]
    assert drawn.startswith("1,500 inputs in ")
    # Most are refused when the manifest is read; enough must get past it, or nothing else is tried.
    for words in ("'read': ", "'opened, refused when read': "):
        found = re.search(words + r"(\d+)", drawn)
        assert found, said
        assert int(found[1]) > 50, said


@pytest.mark.parametrize("name", ["manifest.json", "shard-000001.safetensors"])
def test_a_pipe_does_not_hold_anybody_up(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refusals: list[str] = []

    def read() -> None:
        for step in (Cache, Cache.verify, lambda path: CacheWriter(path, manifest()).close()):
            try:
                refusals.extend(step(tmp_path) or ())  # type: ignore[arg-type]
            except UserError as error:
                refusals.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for the pipe"
    assert len(refusals) >= 2
    assert all("is no file" in refusal for refusal in refusals), refusals


def test_links_are_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-000001.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link, and links are not followed"):
        Cache(tmp_path / "cache")
    # What is written takes the link's place, and leaves alone what it led to.
    kept = (tmp_path / "elsewhere").read_bytes()
    for partial in ("shard-000001.safetensors.partial", "manifest.json.partial"):
        (tmp_path / "cache" / partial).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cache" / "sample").symlink_to(tmp_path)
    fill(tmp_path / "cache")
    assert Cache.verify(tmp_path / "cache") == []
    assert (tmp_path / "elsewhere").read_bytes() == kept
    assert not path.is_symlink()


def test_a_shard_with_another_header_of_the_same_size_is_refused_when_opened(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-000000.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"F64"'))
    with pytest.raises(UserError, match="'sketch' has another shape or dtype"):
        Cache(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [type(LAYERS[0])("a", (3,), 0.5, 0, 1 << 29)]}, "lower `width`"),
        ({"rows": 10**9, "shard_rows": 1}, "`shard_rows` must be at least"),
    ],
)
def test_a_cache_too_large_to_be_read_again_is_not_begun(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        CacheWriter(tmp_path / "cache", manifest(**changes))
    assert not (tmp_path / "cache").exists()


def test_a_large_manifest_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(UserError, match="at most"):
        Manifest.read(tmp_path)


def test_names_of_files_may_be_any_bytes(tmp_path: Path) -> None:
    """A path that is no UTF-8 is written and comes back."""
    path = os.fsdecode(b"/data/\xff.jsonl")
    fill(tmp_path, data={"path": path, "identity": "2"})
    assert Cache(tmp_path).manifest.data["path"] == path


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    """Unless it is asked for: neither its Python nor what a pickle would call."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}'
    )
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    saved = save_tiny(tmp_path, lora=True)
    assert saved.adapter is not None

    class Evil:
        def __reduce__(self) -> tuple:
            return open, (str(tmp_path / "ran"), "w")

    for folder, name in ((saved.model, "pytorch_model.bin"), (saved.adapter, "adapter_model.bin")):
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        torch.save({"x": Evil()}, folder / name)
    with pytest.raises(UserError, match="cannot load"):
        load_model(str(saved.model))
    saved = save_tiny(tmp_path)
    with pytest.raises(UserError, match="cannot load the adapter"):
        load_model(str(saved.model), adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "ran").exists()
